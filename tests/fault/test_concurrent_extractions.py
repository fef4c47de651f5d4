"""Commands that fill one store at the same time do not collide."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from features.errors import StoreMismatchError
from features.index import Index, build_index, find_changes, update_index
from features.sources.webdataset import WebdatasetSource
from features.store import FeatureStore, extend_store
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.feature_stores import store_digests

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
from pipeline.run.config import load_config
from pipeline.interrupt import StopRequest
from pipeline.run.extract import extract

config = load_config(sys.argv[1], [f"run.dir='{sys.argv[2]}'"])
print("ready", flush=True)
sys.stdin.readline()
extract(config, StopRequest())
"""


def begin(run_file: Path, run: Path) -> subprocess.Popen[str]:
    """Start a process that is ready to extract, and waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run_file), str(run)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(*processes: subprocess.Popen[str]) -> None:
    """Let the processes go, all at once, and see that each ends well."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.slow
def test_two_processes_on_one_new_store_leave_the_bytes_of_one(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=200)
    finish(begin(run_file, tmp_path / "alone"))
    finish(*(begin(run_file, tmp_path / "shared") for _ in range(2)))

    assert store_digests(tmp_path / "shared") == store_digests(tmp_path / "alone")
    assert verify_store(tmp_path / "shared" / "features" / "train.zarr") == []


def index_of(folder: Path, name: str, first: int) -> Index:
    tar = tiny.write_tar(folder / f"{name}.tar", tiny.samples(12, first))
    source = WebdatasetSource(kind="webdataset", path=str(tar))
    return build_index(source.open(), folder / f"{name}.parquet")


def all_at_once(*works: Callable[[], object]) -> list[BaseException | None]:
    """Call each on a thread of its own, begun together; return what each raised."""
    barrier = threading.Barrier(len(works))

    def begin_together(work: Callable[[], object]) -> None:
        barrier.wait()
        work()

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(begin_together, work) for work in works]
    return [future.exception() for future in futures]


def test_eight_that_create_a_store_and_its_encoder_end_with_one(tmp_path: Path) -> None:
    index = index_of(tmp_path, "rows", first=0)
    path = tmp_path / "rows.zarr"

    def create() -> None:
        store = FeatureStore.create(path, index, rows_per_chunk=4)
        store.add_encoder("image/vit", {"model": "vit"}, dim=3)
        store.add_encoder("text/bert", {"model": "bert"}, dim=3)

    assert all_at_once(*[create] * 8) == [None] * 8
    store = FeatureStore.open(path)
    assert store.columns() == ["image/vit", "text/bert/long", "text/bert/short"]
    hidden = [entry.name for entry in tmp_path.rglob("*") if entry.name.startswith(".")]
    assert hidden == []


def test_a_store_that_another_command_made_of_other_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.zarr"
    FeatureStore.create(path, index_of(tmp_path, "first", first=0), rows_per_chunk=4)
    with pytest.raises(StoreMismatchError, match="keys_sha256"):
        FeatureStore.create(path, index_of(tmp_path, "second", first=100), rows_per_chunk=4)


def test_of_two_that_add_an_encoder_with_different_settings_one_is_refused(tmp_path: Path) -> None:
    index = index_of(tmp_path, "rows", first=0)
    store = FeatureStore.create(tmp_path / "rows.zarr", index, rows_per_chunk=4)
    raised = all_at_once(
        lambda: store.add_encoder("image/vit", {"pooling": "cls"}, dim=3),
        lambda: store.add_encoder("image/vit", {"pooling": "mean"}, dim=3),
    )
    (refusal,) = [error for error in raised if error is not None]
    assert isinstance(refusal, StoreMismatchError)
    assert "pooling = " in str(refusal)


def test_of_eight_that_append_to_an_index_and_a_store_each_ends_with_all_rows(
    tmp_path: Path,
) -> None:
    source = WebdatasetSource(kind="webdataset", path=str(tmp_path / "*.tar"))
    tiny.write_tar(tmp_path / "a.tar", tiny.samples(10))
    path, store = tmp_path / "index.parquet", tmp_path / "rows.zarr"
    FeatureStore.create(store, build_index(source.open(), path), rows_per_chunk=4)
    tiny.write_tar(tmp_path / "b.tar", tiny.samples(7))

    def append() -> None:
        index = Index.open(path)
        reader = source.open(index.names)
        if changes := find_changes(index, reader):
            index = update_index(index, reader, changes, append=True)
        extend_store(FeatureStore.open(store), index, append=False)

    assert all_at_once(*[append] * 8) == [None] * 8
    whole = FeatureStore.create(
        tmp_path / "w.zarr", build_index(source.open(), path), rows_per_chunk=4
    )
    assert store_files(store) == store_files(tmp_path / "w.zarr")
    assert whole.rows == 17
    assert [entry for entry in tmp_path.rglob("*") if entry.name.startswith(".")] == []


def store_files(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its place."""
    files = (path for path in store.rglob("*") if path.is_file())
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}
