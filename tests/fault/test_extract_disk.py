"""What becomes of an extraction on a disk that is full, read-only, or not there."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.stores.verify import verify_store
from tests import tiny
from tests.commands import sail, the_error_of
from tests.feature_stores import store_digests


class Disk:
    """A file system of its own in memory, whose size and mode can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64m", "none", str(path))

    def set(self, option: str) -> None:
        """Mount it again with another option, such as `size=1m` or `ro`."""
        self._mount("-o", f"remount,{option}", str(self.path))

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    try:
        disk = Disk(tmp_path / "disk")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system may be mounted here: {error.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.path)], check=True)


def assert_whole_as_far_as_it_goes(run: Path) -> None:
    for store in run.glob("features/*.zarr"):
        assert [fault for fault in verify_store(store) if "is not done" not in fault] == []


@pytest.mark.parametrize(
    "kilobytes", [60, *(pytest.param(size, marks=pytest.mark.slow) for size in (8, 24, 300, 700))]
)
def test_a_full_disk_is_one_clear_line_and_the_run_goes_on_when_there_is_room(
    kilobytes: int, disk: Disk, tmp_path: Path
) -> None:
    run_file = tiny.world(tmp_path, rows=120)
    sail("extract", run_file)
    disk.set(f"size={kilobytes}k")
    on_disk = f"--set=run.dir='{disk.path}'"
    error = the_error_of(sail("extract", run_file, on_disk, expect=1))
    assert "No space left on device" in error
    assert "what was done is kept" in error
    assert_whole_as_far_as_it_goes(disk.path)

    disk.set("size=64m")
    sail("extract", run_file, on_disk)
    assert store_digests(disk.path) == store_digests(tmp_path / "run")
    assert verify_store(disk.path / "features" / "train.zarr") == []


def test_a_read_only_store_can_be_read_and_refuses_to_be_filled(disk: Disk, tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=24)
    store = disk.path / "features" / "train.zarr"
    on_disk = f"--set=run.dir='{disk.path}'"
    sail("extract", run_file, on_disk)
    (store / "image" / "vit" / "status" / "c" / "1").unlink()
    before = store_digests(disk.path)
    disk.set("ro")
    assert "24" in sail("inspect", store).stdout
    assert "chunk 1 is not done" in sail("verify", store, expect=1).stderr
    assert "Read-only file system" in the_error_of(sail("extract", run_file, on_disk, expect=1))

    run = tmp_path / "elsewhere"  # only the features are on the disk that cannot be written
    run.mkdir()
    shutil.copytree(disk.path / "index", run / "index")
    (run / "features").symlink_to(disk.path / "features")
    error = the_error_of(sail("extract", run_file, f"--set=run.dir='{run}'", expect=1))
    assert "Read-only file system" in error
    assert store_digests(disk.path) == before

    disk.set("rw")
    sail("extract", run_file, on_disk)
    assert verify_store(store) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "exists"),
        (lambda path: path.symlink_to(path), "exists"),
        (lambda path: path.symlink_to("/proc/1/nowhere"), "exists"),
    ],
    ids=["a file", "a loop", "a place that cannot be"],
)
def test_a_run_folder_that_cannot_be_written_is_named(
    make: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    run_file = tiny.world(tmp_path, rows=4)
    make(tmp_path / "run")
    error = the_error_of(sail("extract", run_file, expect=1))
    assert str(tmp_path / "run") in error
    assert words in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_without_permission_is_named(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=4)
    (tmp_path / "run").mkdir(mode=0o555)
    error = the_error_of(sail("extract", run_file, expect=1))
    assert str(tmp_path / "run") in error
    assert "Permission denied" in error
