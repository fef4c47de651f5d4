"""What runs on a GPU is right on a simulated one: no race, no other device, few waits.

The tests of `inside`, and those marked `gpu`, run in a process of their own, whose torch has
simulated GPUs; see `gpu` for what these can show and what they cannot.
"""

import os
import subprocess
import sys

import pytest

from tests.simulated_cuda.build import ROOT, why_not

MARKED = [
    "tests/unit/test_packing.py",
    "tests/parity/test_gpu_images.py",
]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def run(*arguments: str, **environment: str) -> str:
    """Call pytest where GPUs are simulated, and see that everything passes and something runs."""
    command = [sys.executable, "-m", "tests.simulated_cuda", "-q", "-p", "no:cacheprovider"]
    # The shapes of the same functions are checked by the tests on a CPU.
    command += ["-o", "addopts=--import-mode=importlib -rf", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_quick() -> None:
    run("--confcutdir=tests/simulated_cuda", "-m", "not slow", "tests/simulated_cuda/inside")


@pytest.mark.slow
def test_whole_commands() -> None:
    run("-m", "slow", "tests/simulated_cuda/inside")


@pytest.mark.slow
def test_the_memory_of_a_step_at_the_sizes_of_the_recipes() -> None:
    peaks = "tests/simulated_cuda/inside/test_peaks.py"
    assert "skipped" not in run("--confcutdir=tests/simulated_cuda", peaks, SIMULATED_META="1")


@pytest.mark.slow
@pytest.mark.parametrize("file", MARKED)
def test_the_tests_marked_gpu(file: str) -> None:
    assert "skipped" not in run("-m", "gpu and not slow", file)
