"""An extraction killed at any moment leaves whole chunks; the next run ends with the same bytes."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.inspection import verify_store
from tests import tiny
from tests.feature_stores import store_digests

ROOT = Path(__file__).resolve().parents[2]
KILLS = 10
ROWS = 600
CHILD = """
import sys
from pipeline.config import load_config
from pipeline.interrupt import StopRequest
from pipeline.run import extract

config = load_config(sys.argv[1], [f"run.dir='{sys.argv[2]}'"])
print("started", flush=True)
extract(config, StopRequest())
"""


def started(run_file: Path, run: Path) -> subprocess.Popen[str]:
    """Begin an extraction and return once its imports are done."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run_file), str(run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_bytes_of_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    run_file = tiny.world(tmp_path, rows=ROWS)
    begun = time.monotonic()
    with started(run_file, tmp_path / "whole") as process:
        assert process.wait() == 0
    seconds = time.monotonic() - begun

    moments = random.Random(0)
    kills = 0
    for _ in range(KILLS):
        with started(run_file, tmp_path / "killed") as process:
            try:
                process.wait(timeout=moments.uniform(0, seconds / KILLS))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
    with started(run_file, tmp_path / "killed") as process:
        assert process.wait() == 0

    assert kills >= KILLS // 2  # the rest may have finished before their moment
    whole = store_digests(tmp_path / "whole")
    assert store_digests(tmp_path / "killed") == whole
    assert verify_store(tmp_path / "killed" / "features" / "train.zarr") == []
