"""A conversion that is killed leaves nothing at its place, and the next leaves nothing of it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from features.store import FeatureStore
from pipeline.formats.exporting import export_store
from pipeline.formats.importing import Wanted, import_store
from pipeline.inspection import verify_store
from pipeline.interrupt import StopRequest
from pipeline.rewrite.merge import rechunk_store
from tests.feature_stores import make_store

GO_ON = StopRequest()


class KillAfter(StopRequest):
    """SIGKILL, which no process can answer, after some chunks."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks

    def __call__(self) -> bool:
        self.chunks -= 1
        if self.chunks < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def to_parquet(folder: Path, stop: StopRequest) -> Path:
    return export_store(folder / "s.zarr", "parquet", folder / "out.parquet", stop)


def to_folder(folder: Path, stop: StopRequest) -> Path:
    return export_store(folder / "s.zarr", "clip-retrieval", folder / "out", stop)


def to_chunks(folder: Path, stop: StopRequest) -> Path:
    return Path(str(rechunk_store(folder / "s.zarr", folder / "out.zarr", 7, stop)))


def from_hdf5(folder: Path, stop: StopRequest) -> Path:
    return Path(str(import_store(folder / "in.h5", folder / "out.zarr", Wanted(), stop)))


@pytest.mark.parametrize("work", [to_parquet, to_folder, to_chunks, from_hdf5])
def test_what_is_killed_is_not_there_and_is_cleared_away_by_the_next(
    tmp_path: Path, work: Callable[[Path, StopRequest], Path]
) -> None:
    store = make_store(tmp_path / "s.zarr", rows=100)
    export_store(store.path, "hdf5", tmp_path / "in.h5", GO_ON)
    there = {path.name for path in tmp_path.iterdir()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.formats.importing", "pipeline.rewrite.merge"])
    process = context.Process(target=work, args=(tmp_path, KillAfter(4)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = {path.name for path in tmp_path.iterdir()} - there
    assert left.endswith(".partial")
    out = work(tmp_path, GO_ON)
    assert {path.name for path in tmp_path.iterdir()} == there | {out.name}
    if out.suffix == ".zarr":
        assert verify_store(out) == []
        assert FeatureStore.open(out).keys_sha256 == store.keys_sha256
