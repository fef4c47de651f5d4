"""A conversion that is stopped or killed goes on where it was, and the result is the same bytes."""

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from features.errors import LockedError, SourceError, StorageError, StoreCorruptError
from features.storage.place import as_place
from features.store import FeatureStore
from pipeline.interrupt import Stopped, StopRequest
from pipeline.stores import clip_retrieval, hdf5, parquet
from pipeline.stores.convert import Wanted, import_store
from pipeline.stores.merge import merge_stores, rechunk_store
from pipeline.stores.resumable import unfinished
from pipeline.stores.subset import Choice, subset_store
from pipeline.stores.writer import StoreRows
from tests.feature_stores import IMAGE, StopAfter, make_store, on_disk
from tests.processes import forks
from tests.servers import Bucket

Work = Callable[[Path, StopRequest], object]
READS = 7
"""Chunks of the store that is converted."""


class Counting(StopRequest):
    """No signal; counts how often it is asked for one, which is before every read."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return False


class KillAfter(StopAfter):
    """SIGKILL, which no process can answer, after some reads."""

    def __call__(self) -> bool:
        if super().__call__():
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def rows_in(folder: Path) -> StoreRows:
    return StoreRows(FeatureStore.open(folder / "s.zarr"))


def to_hdf5(folder: Path, stop: StopRequest) -> object:
    return hdf5.write(rows_in(folder), folder / "out", stop)


def to_parquet(folder: Path, stop: StopRequest) -> object:
    return parquet.write(rows_in(folder), folder / "out", stop, file_bytes=1)


def to_clip_retrieval(folder: Path, stop: StopRequest) -> object:
    return clip_retrieval.write(rows_in(folder), folder / "out", stop, rows_per_file=16)


def from_hdf5(folder: Path, stop: StopRequest) -> object:
    return import_store(folder / "in.h5", folder / "out", Wanted(), stop)


def from_parquet(folder: Path, stop: StopRequest) -> object:
    return import_store(folder / "in.parquet", folder / "out", Wanted(), stop)


def to_larger_chunks(folder: Path, stop: StopRequest) -> object:
    return rechunk_store(folder / "s.zarr", folder / "out", 20, stop)


def to_smaller_chunks(folder: Path, stop: StopRequest) -> object:
    return rechunk_store(folder / "s.zarr", folder / "out", 5, stop)


def to_merged(folder: Path, stop: StopRequest) -> object:
    stores = [folder / "s.zarr", folder / "t.zarr"]
    return merge_stores(stores, folder / "out", stop, prefix=True)


def to_subset(folder: Path, stop: StopRequest) -> object:
    return subset_store(folder / "s.zarr", folder / "out", Choice(random=60), stop)


WORKS = [
    to_hdf5,
    to_parquet,
    to_clip_retrieval,
    from_hdf5,
    from_parquet,
    to_larger_chunks,
    to_smaller_chunks,
    to_merged,
    to_subset,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_store(tmp_path / "s.zarr", rows=100, bad_images=(33,))
    make_store(tmp_path / "t.zarr", rows=50, seed=1)
    hdf5.write(rows_in(tmp_path), tmp_path / "in.h5", StopRequest())
    parquet.write(rows_in(tmp_path), tmp_path / "in.parquet", StopRequest())
    return tmp_path


def digests_of(path: Path) -> dict[str, str]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def finished_at_once(folder: Path, work: Work) -> tuple[dict[str, str], int]:
    """Return what an undisturbed conversion writes, and how often it asks whether to stop."""
    counting = Counting()
    work(folder, counting)
    expected = digests_of(folder / "out")
    (folder / "out").rename(folder / "expected")
    return expected, counting.asked


def kill(folder: Path, work: Work, reads: int) -> None:
    process = forks().Process(target=work, args=(folder, KillAfter(reads)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS)
def test_the_same_call_goes_on_after_a_signal(folder: Path, work: Work) -> None:
    expected, reads = finished_at_once(folder, work)
    there = {path.name for path in folder.iterdir()}
    with pytest.raises(Stopped):
        work(folder, StopAfter(reads - 2))
    assert {path.name for path in folder.iterdir()} == there | {".out.unfinished"}
    counting = Counting()
    work(folder, counting)
    assert digests_of(folder / "out") == expected
    assert counting.asked < reads / 2
    assert {path.name for path in folder.iterdir()} == there | {"out"}


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS)
def test_the_same_call_goes_on_after_a_kill(folder: Path, work: Work) -> None:
    expected, reads = finished_at_once(folder, work)
    kill(folder, work, reads - 2)
    kill(folder, work, 1)
    assert not (folder / "out").exists()
    counting = Counting()
    work(folder, counting)
    assert digests_of(folder / "out") == expected
    assert counting.asked < reads / 2
    assert not (folder / ".out.unfinished").exists()


def test_columns_of_hdf5_fill_room_and_change_no_byte_of_the_tree(folder: Path) -> None:
    with pytest.raises(Stopped):
        to_hdf5(folder, StopAfter(READS))  # texts and numbers are written
    before = np.frombuffer((folder / ".out.unfinished" / "made").read_bytes(), dtype=np.uint8)
    to_hdf5(folder, StopRequest())
    after = np.frombuffer((folder / "out").read_bytes(), dtype=np.uint8)
    is_room = np.zeros(len(after), dtype=bool)
    with h5py.File(folder / "out") as file:
        for column in rows_in(folder).layout.columns:
            for array in ("features", "status"):
                chunks = file[column][array].id
                for number in range(chunks.get_num_chunks()):
                    chunk = chunks.get_chunk_info(number)
                    is_room[chunk.byte_offset : chunk.byte_offset + chunk.size] = True
    assert len(before) == len(after)
    assert not before[is_room].any()
    np.testing.assert_array_equal(before[~is_room], after[~is_room])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB of its own, with the store `s.zarr` of half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted: that needs root")
    try:
        make_store(disk / "s.zarr", rows=100, image_dim=2048)
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("work", [to_hdf5, to_parquet, to_clip_retrieval, to_smaller_chunks])
def test_the_same_call_goes_on_when_a_full_disk_has_room_again(
    small_disk: Path, work: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "out"
    work(small_disk, StopRequest())
    expected = digests_of(out)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(room - 200_000))
    with pytest.raises(OSError, match="No space left"):
        work(small_disk, StopRequest())
    assert not out.exists()
    (small_disk / "filler").unlink()
    work(small_disk, StopRequest())
    assert digests_of(out) == expected
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_of_other_rows_or_of_another_form_begins_anew(folder: Path) -> None:
    expected, reads = finished_at_once(folder, to_larger_chunks)
    for other in (to_smaller_chunks, to_subset, to_parquet):
        with pytest.raises(Stopped):
            other(folder, StopAfter(4))
    with pytest.raises(Stopped):
        to_larger_chunks(folder, StopAfter(3))
    column = FeatureStore.open(folder / "s.zarr").column(f"image/{IMAGE}")
    column.write(0, column.read(16, 32), column.status()[16:32])
    counting = Counting()
    to_larger_chunks(folder, counting)
    assert counting.asked == reads
    found = digests_of(folder / "out")
    for changed in ("features", "identity"):
        name = f"image/{IMAGE}/{changed}/c/0/0"
        assert found.pop(name) != expected.pop(name)
    assert found == expected


def test_of_rows_that_make_no_store_nothing_is_kept(folder: Path) -> None:
    there = {path.name for path in folder.iterdir()}
    with pytest.raises(SourceError, match="50 keys come twice"):
        merge_stores([folder / "s.zarr", folder / "t.zarr"], folder / "out", StopRequest())
    assert {path.name for path in folder.iterdir()} == there


@pytest.mark.parametrize("work", [to_hdf5, to_parquet, to_larger_chunks])
def test_the_same_call_goes_on_when_a_damaged_chunk_is_mended(folder: Path, work: Work) -> None:
    expected, reads = finished_at_once(folder, work)
    file = on_disk(rows_in(folder).store.column(f"image/{IMAGE}").features_file(5))
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(StoreCorruptError, match="features/c/5/0 is damaged"):
        work(folder, StopRequest())
    file.write_bytes(whole)
    counting = Counting()
    work(folder, counting)
    assert digests_of(folder / "out") == expected
    assert counting.asked < reads / 2


def test_under_a_url_a_store_is_made_here_and_uploaded_when_it_is_whole(
    folder: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    rechunk_store(folder / "s.zarr", folder / "expected", 20, StopRequest())
    s3.upload(folder / "s.zarr", "s.zarr")
    place = as_place(s3.url("s.zarr"))
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    out = as_place(s3.url("out"))
    with pytest.raises(Stopped):
        rechunk_store(place, out, 20, StopAfter(3))
    assert s3.content("out") == {}
    with monkeypatch.context() as without_network:
        without_network.setattr("features.storage.groups.write", refuse)
        with pytest.raises(StorageError, match="no network"):
            rechunk_store(place, out, 20, StopRequest())
    assert s3.content("out") == {}
    counting = Counting()
    rechunk_store(place, out, 20, counting)
    assert counting.asked == 0  # all of it was there, but for the upload
    expected = folder / "expected"
    files = [file for file in expected.rglob("*") if file.is_file()]
    assert s3.content("out") == {
        file.relative_to(expected).as_posix(): file.read_bytes() for file in files
    }
    assert list((folder / "here").iterdir()) == []


def refuse(place: object, content: bytes) -> None:
    raise StorageError("no network")


def test_a_second_process_is_told_to_wait(folder: Path) -> None:
    expected, _ = finished_at_once(folder, to_larger_chunks)
    with pytest.raises(Stopped):
        to_larger_chunks(folder, StopAfter(3))
    with unfinished(folder / "out", "held") as held:  # of other rows: what there was is gone
        assert held.done == 0
        held.made.touch()
        held.advance()
        words = rf"out is being made by another process \(process {os.getpid()} on "
        with pytest.raises(LockedError, match=words):
            to_larger_chunks(folder, StopRequest())
    to_larger_chunks(folder, StopRequest())
    assert digests_of(folder / "out") == expected
