"""`sail align` in several processes, as a user starts them with torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.checkpoint import Checkpoint, load_head
from tests.feature_stores import make_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ALIGN = """
batch_size = 32
steps = 300
eval_every = 50
memory_mb = 1
head = { dim = 8, depth = 2 }
"""


def torchrun(run_file: Path) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    free_port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen(
        [*launcher, *free_port, "-m", "pipeline.cli", "align", str(run_file)],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def worker(launcher: int, rank: int) -> int:
    """Process id of a process that torchrun started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise LookupError(f"torchrun has no process of rank {rank} among {children}")


def test_a_signal_to_one_process_saves_and_ends_all_and_the_command_goes_on_from_there(
    tmp_path: Path,
) -> None:
    run_file = make_run(tmp_path, ALIGN)
    align = run_file.parent / "align"
    launched = torchrun(run_file)
    deadline = time.monotonic() + 120
    while not (align / "metrics.jsonl").is_file() or not (align / "metrics.jsonl").read_text():
        assert launched.poll() is None, launched.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(worker(launched.pid, rank=1), signal.SIGTERM)
    told = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0
    assert "exitcode  : 143" in told
    assert "Traceback" not in told.split("Stopped; what is done is saved")[0]
    reached = Checkpoint.open(align / "last").step
    assert 0 < reached < 300

    launched = torchrun(run_file)
    printed, told = launched.communicate(timeout=240)
    assert launched.returncode == 0, told
    assert printed.strip() == str(align / "best")  # once, though there are two processes
    load_head(align / "best")
    assert Checkpoint.open(align / "last").step == 300
