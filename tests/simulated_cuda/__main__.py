"""Runs pytest on simulated GPUs: `python -m tests.simulated_cuda PYTEST-ARGUMENTS`."""

import sys

from tests.simulated_cuda import gpu

gpu.install()

import pytest  # noqa: E402 - tests ask torch for its devices while they are imported

sys.exit(pytest.main(sys.argv[1:]))
