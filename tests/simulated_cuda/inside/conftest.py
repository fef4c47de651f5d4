"""The tests of this folder are collected on simulated GPUs only; see `test_simulated`."""

import sys

if "tests.simulated_cuda.gpu" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]
