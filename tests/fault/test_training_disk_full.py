"""A disk that is full when a checkpoint is due leaves the one before, and one clear line."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.checkpoint import Checkpoint, load_head
from align.config import AlignConfig, HeadConfig
from features.errors import CheckpointError
from tests.feature_stores import make_store
from tests.trainings import run, weights

CONFIG = AlignConfig(
    batch_size=32,
    steps=6,
    holdout=0.2,
    memory_mb=1,
    checkpoint_every=1,
    head=HeadConfig(dim=64, depth=2),
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB of its own, so that filling it harms nobody."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted: that needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_what_to_do(
    small_disk: Path, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "s.zarr")
    filler, run_dir = small_disk / "filler", small_disk / "run"

    def fill_up(step: int, _total: int, _note: str) -> None:
        if step == 3:
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"],
                stderr=subprocess.DEVNULL,
                check=False,
            )

    with pytest.raises(CheckpointError) as raised:
        run(store, run_dir, CONFIG, fill_up)
    told = str(raised.value)
    assert "The checkpoint of step 4 cannot be written" in told
    assert "No space left on device" in told
    assert "Make room on the disk" in told
    assert "step-00000003, is whole" in told
    assert Checkpoint.open(run_dir / "last").step == 3
    load_head(run_dir / "last")
    filler.unlink()
    run(store, run_dir, CONFIG)
    run(store, tmp_path / "whole", CONFIG)
    assert weights(run_dir, "last") == weights(tmp_path / "whole", "last")
