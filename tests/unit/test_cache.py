"""Chunks of remote stores are kept on local disk, within a bound, and never in place of others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.chunk_reader import ChunkCache
from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.loader import MIB, Loader, LoaderOptions, Source
from features.storage.place import as_place
from features.store import FeatureStore
from tests.feature_stores import IMAGE, TEXT, make_store
from tests.servers import Bucket

CHUNK = 16 * 2 * 10 + 4  # bytes of a chunk of a caption field, the larger ones


@pytest.fixture
def source(tmp_path: Path, s3: Bucket) -> Source:
    """Rows of a store on a real S3 server."""
    s3.upload(tmp_path / make_store(tmp_path / "s.zarr").path.name, "s.zarr")
    store = FeatureStore.open(as_place(s3.url("s.zarr")))
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.0, holdout_rows=1)
    return Source(columns, selection.train, selection.text_ok)


def options(cache: Path, cache_bytes: int) -> LoaderOptions:
    return LoaderOptions(24, memory_bytes=MIB, cache=cache, cache_bytes=cache_bytes)


def epoch(source: Source, given: LoaderOptions) -> list[tuple[list[int], torch.Tensor]]:
    loader = Loader([source], given)
    steps = loader.steps_per_epoch
    return [(each.rows.tolist(), each.text.clone()) for each in loader.batches(0, steps)]


def kept(cache: Path) -> list[Path]:
    return sorted(file for file in cache.rglob("*") if file.is_file())


def test_a_second_loader_reads_no_chunk_of_the_store_again(
    source: Source, tmp_path: Path, s3: Bucket
) -> None:
    given = options(tmp_path / "cache", MIB)
    first = epoch(source, given)
    assert len(kept(tmp_path / "cache")) == 3 * source.columns.image.num_chunks

    for name in s3.content("s.zarr"):
        if "/features/c/" in name:
            s3.remove(f"s.zarr/{name}")
    second = epoch(source, given)
    for (rows, text), (other_rows, other_text) in zip(first, second, strict=True):
        assert rows == other_rows
        assert torch.equal(text, other_text)


def test_no_more_is_kept_than_was_allowed(source: Source, tmp_path: Path) -> None:
    given = options(tmp_path / "cache", 5 * CHUNK)
    expected = epoch(source, replace(given, cache=None))
    for _ in range(2):
        found = epoch(source, given)
        assert [rows for rows, _ in found] == [rows for rows, _ in expected]
        files = kept(tmp_path / "cache")
        assert 4 * CHUNK < sum(file.stat().st_size for file in files) <= 5 * CHUNK


def test_a_damaged_chunk_is_read_from_the_store_again(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = options(tmp_path / "cache", MIB)
    expected = epoch(source, given)
    damaged = kept(tmp_path / "cache")[4]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    found = epoch(source, given)
    assert "It is read from the store again." in caplog.text
    for (_, text), (_, other_text) in zip(expected, found, strict=True):
        assert torch.equal(text, other_text)


def test_chunks_of_other_rows_are_not_taken_for_these(source: Source, tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path / "cache", MIB)
    columns = source.columns
    values = np.ones((16, columns.image.dim), dtype=np.float16)
    cache.add(columns, columns.image, 0, values)
    buffer = np.zeros_like(values)
    assert ChunkCache(tmp_path / "cache", MIB).read_into(columns, columns.image, 0, buffer)
    np.testing.assert_array_equal(buffer, values)
    (tmp_path / "o").mkdir()
    store = make_store(tmp_path / "o" / "s.zarr", rows=150)
    other = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    again = ChunkCache(tmp_path / "cache", MIB)
    assert not again.read_into(other, other.image, 0, buffer)


def test_what_is_left_of_a_cache_is_shared_out_among_processes(
    source: Source, tmp_path: Path
) -> None:
    columns = source.columns
    values = np.ones((16, columns.image.dim), dtype=np.float16)
    size = values.nbytes + 4

    def add(first: int, processes: int) -> None:
        for rank in range(processes):
            cache = ChunkCache(tmp_path / "cache", 10 * size, processes=processes)
            for chunk in range(first + 10 * rank, first + 10 * rank + 5):
                cache.add(columns, columns.image, chunk, values)

    add(0, 1)
    add(100, 2)
    assert 7 <= len(kept(tmp_path / "cache")) <= 10


def test_a_disk_that_takes_no_chunks_costs_the_cache_and_not_the_training(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()  # a file, where a folder could be made
    given = options(tmp_path / "cache", MIB)
    found = epoch(source, given)
    assert [rows for rows, _ in found] == [
        rows for rows, _ in epoch(source, replace(given, cache=None))
    ]
    assert "no more chunks are kept" in caplog.text
