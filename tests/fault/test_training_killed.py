"""A training killed at any moment leaves a whole checkpoint, and goes on to the same end."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import align.checkpoint
from align.checkpoint import Checkpoint, load_head
from features.store import FeatureStore
from tests.feature_stores import make_store
from tests.trainings import LONG, LONG_STEPS, run, weights

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
from pathlib import Path
import torch
from tests.trainings import LONG, run
from features.store import FeatureStore

torch.set_num_threads(int(sys.argv[3]))
run(FeatureStore.open(Path(sys.argv[1])), Path(sys.argv[2]), LONG)
"""
# Imports once and then is a new process for each of 30 attempts, killed at a random moment.
NURSERY = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tests.trainings import LONG, run
from features.store import FeatureStore

store, run_dir, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
moments = random.Random(4)
for _ in range(30):
    steps, word = os.pipe()
    child = os.fork()
    if child == 0:
        run(FeatureStore.open(Path(store)), Path(run_dir), LONG, lambda *_: os.write(word, b"."))
        os._exit(0)
    os.close(word)
    for _ in range(moments.randrange(12)):
        os.read(steps, 1)
    time.sleep(moments.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(steps)
"""


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` may catch it."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("killed") / "s.zarr", bad_images=(2,))


@pytest.mark.slow
def test_a_kill_between_any_two_writes_leaves_whole_checkpoints_and_the_same_end(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(store, tmp_path / "whole")
    moment = 0
    while True:
        run_dir = tmp_path / "killed"
        if not _run_until(monkeypatch, store, run_dir, moment):
            break
        moment += 7  # a save has about twenty calls: over six saves, all kinds are met
        for name in ("last", "best"):
            if (run_dir / name).exists():
                load_head(run_dir / name)  # raises if it is not whole
        assert run(store, run_dir) is not None
        for name in ("last", "best"):
            assert weights(run_dir, name) == weights(tmp_path / "whole", name)
        shutil.rmtree(run_dir)
    assert moment > 30


def _run_until(
    monkeypatch: pytest.MonkeyPatch, store: FeatureStore, run_dir: Path, moment: int
) -> bool:
    """Run, and die before a given call that changes files; return whether it died."""
    calls = 0

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            if calls == moment:
                raise Killed
            calls += 1
            return original(*arguments, **named)

        patch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        for name in ("synchronise", "synchronise_all", "save_file"):
            counted(align.checkpoint, name)
        for name in ("rename", "replace", "symlink_to", "unlink", "mkdir"):
            counted(Path, name)
        counted(shutil, "rmtree")
        try:
            run(store, run_dir)
        except Killed:
            return True
    return False


@pytest.mark.slow
def test_a_process_killed_by_sigkill_goes_on_to_the_same_weights(
    store: FeatureStore, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    arguments = [str(store.path), str(run_dir), str(torch.get_num_threads())]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while _lines(run_dir / "metrics.jsonl") < 30:
            assert child.poll() is None, "the child ended by itself"
            assert time.monotonic() < deadline, "the child did not get anywhere"
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    reached = Checkpoint.open(run_dir / "last")
    assert 20 <= reached.step < LONG_STEPS
    load_head(run_dir / "best")
    run(store, run_dir, LONG)
    run(store, tmp_path / "whole", LONG)
    for name in ("last", "best"):
        assert weights(run_dir, name) == weights(tmp_path / "whole", name)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["resident", "streamed"])
def test_thirty_kills_at_random_moments_change_nothing(tmp_path: Path, tier: str) -> None:
    rows = 400 if tier == "resident" else 24_000  # of 56 bytes, with 1 MiB for the windows
    store = make_store(tmp_path / "s.zarr", rows=rows, rows_per_chunk=rows // 20)
    run_dir = tmp_path / "killed"
    arguments = [str(store.path), str(run_dir), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", NURSERY, *arguments], cwd=ROOT, check=True)
    assert 20 < Checkpoint.open(run_dir / "last").step < LONG_STEPS
    run(store, tmp_path / "whole", LONG)
    run(store, run_dir, LONG)
    for name in ("last", "best"):
        assert weights(run_dir, name) == weights(tmp_path / "whole", name)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0
