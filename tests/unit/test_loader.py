"""Batches hold the features of the rows they name, within the memory they were given."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.loader import MIB, Batch, Loader, LoaderOptions, Source
from features.errors import StoreCorruptError, TrainingError
from features.storage import chunks as scattered
from features.store import FeatureStore
from tests.feature_stores import IMAGE, TEXT, make_store, on_disk

TENSORS = ("image", "text", "fields", "caption_ids")
SMALL, LARGE = 9_000, 10 * MIB  # bytes: some chunks of the store below, all of it


def make_source(path: Path) -> Source:
    store = make_store(
        path / "s.zarr",
        bad_images=(0, 17),
        bad_captions=((3, 0), (4, 1), (5, 0), (5, 1)),
        captions={"bare": ["red", "blue"] * 100, "long": [f"row {row}" for row in range(200)]},
    )
    return source_of(store)


def source_of(store: FeatureStore) -> Source:
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.0, holdout_rows=10)
    return Source(columns, selection.train, selection.text_ok)


def make_loader(source: Source, memory: int = SMALL, **options: Any) -> Loader:
    given = LoaderOptions(batch_size=24, memory_bytes=memory, with_caption_ids=True)
    return Loader([source], replace(given, **options))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return make_source(tmp_path)


def copies(loader: Loader, first: int, stop: int) -> list[Batch]:
    """Batches whose memory is not used again."""
    return [
        replace(batch, image=batch.image.clone(), text=batch.text.clone())
        for batch in loader.batches(first, stop)
    ]


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(expected, name))


def assert_holds_its_rows(batch: Batch, columns: Columns) -> None:
    """Check a batch of all fields against the features in the store."""
    rows = columns.store.rows
    text = np.stack([column.read(0, rows) for column in columns.text], axis=1)
    np.testing.assert_array_equal(batch.image.numpy(), columns.image.read(0, rows)[batch.rows])
    np.testing.assert_array_equal(batch.text.numpy(), text[batch.rows])


def feature_files(columns: Columns) -> dict[int, list[Path]]:
    """The files of each chunk of features."""
    every = (columns.image, *columns.text)
    return {
        chunk: [on_disk(column.features_file(chunk)) for column in every]
        for chunk in range(columns.image.num_chunks)
    }


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_a_batch_holds_the_features_of_its_rows(source: Source, memory: int) -> None:
    loader = make_loader(source, memory)
    assert loader.tier == ("device" if memory == LARGE else "streaming")
    for batch in loader.batches(0, 2 * loader.steps_per_epoch):
        assert_holds_its_rows(batch, source.columns)


def test_rows_without_an_image_or_any_caption_are_never_in_a_batch(source: Source) -> None:
    loader = make_loader(source, batch_size=1)
    seen = np.concatenate([batch.rows for batch in loader.batches(0, loader.steps_per_epoch)])
    assert sorted(seen) == sorted(set(range(200)) - {0, 17, 5})


def test_a_batch_says_of_which_field_each_text_is_and_which_captions_are_missing(
    source: Source,
) -> None:
    loader = make_loader(source, batch_size=1)
    assert loader.fields == ("bare", "long")
    fields = {
        int(batch.rows[0]): batch.fields[0].tolist()
        for batch in loader.batches(0, loader.steps_per_epoch)
    }
    assert (fields[3], fields[4], fields[6]) == ([-1, 1], [0, -1], [0, 1])


def test_caption_ids_are_equal_where_the_words_are(source: Source) -> None:
    (batch,) = copies(make_loader(source), 0, 1)
    assert batch.caption_ids is not None
    bare, long = batch.caption_ids.T.numpy()
    colour = batch.rows % 2
    np.testing.assert_array_equal(bare[:, None] == bare, colour[:, None] == colour)
    assert len(np.unique(long)) == len(long)


def test_beginning_in_the_middle_gives_the_same_batches_and_reads_only_their_chunks(
    source: Source,
) -> None:
    loader = make_loader(source, captions_per_image=1)
    steps = 2 * loader.steps_per_epoch
    expected = copies(loader, 0, steps)[-1]
    needed = 0
    for files in feature_files(source.columns).values():
        contents = [file.read_bytes() for file in files]
        for file in files:
            file.unlink()
        try:
            assert_same(
                copies(make_loader(source, captions_per_image=1), steps - 1, steps)[0], expected
            )
        except StoreCorruptError:
            needed += 1
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
    assert len(np.unique(expected.rows // 16)) <= needed <= 6  # of 13; a window has at most 6


def test_a_store_that_fits_is_read_once(source: Source) -> None:
    loader = make_loader(source, LARGE)
    expected = copies(loader, 0, 3 * loader.steps_per_epoch)
    for files in feature_files(source.columns).values():
        for file in files:
            file.unlink()
    for found, batch in zip(loader.batches(0, len(expected)), expected, strict=True):
        assert_same(found, batch)


@pytest.fixture
def wide(tmp_path: Path) -> Source:
    """Chunks of images so large that they are read piece by piece."""
    return source_of(make_store(tmp_path / "wide.zarr", rows=112, image_dim=70_000))


def test_a_chunk_read_in_small_pieces_gives_the_same_batches(wide: Source) -> None:
    loader = make_loader(wide, 12 * MIB, batch_size=8)
    assert loader.tier == "streaming"
    for batch in loader.batches(0, 2 * loader.steps_per_epoch):
        assert_holds_its_rows(batch, wide.columns)


def test_rows_come_to_the_same_places_where_the_system_cannot_put_them_there(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(source)
    steps = loader.steps_per_epoch
    copies(loader, 0, steps)  # every crc32c is checked now, and not again
    straight = copies(loader, steps, 2 * steps)
    monkeypatch.setattr(scattered, "PREADV", None)
    for batch, same in zip(straight, copies(loader, steps, 2 * steps), strict=True):
        assert_same(batch, same)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-2], "2 bytes follow its"),
        (lambda data: data[:40], "it ends within"),
        (lambda data: data + b"x", "5 bytes follow its"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "crc32c"),
    ],
)
def test_a_damaged_chunk_that_is_read_in_pieces_is_named(
    wide: Source, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = on_disk(wide.columns.image.features_file(1))
    file.write_bytes(damage(file.read_bytes()))
    loader = make_loader(wide, 12 * MIB, batch_size=8)
    with pytest.raises(StoreCorruptError, match=message) as caught:
        copies(loader, 0, loader.steps_per_epoch)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_drawn_captions_are_ones_that_can_be_used_and_change_from_step_to_step(
    source: Source, memory: int
) -> None:
    loader = make_loader(source, memory, captions_per_image=1)
    text = np.stack([column.read(0, 200) for column in source.columns.text], axis=1)
    drawn = dict[int, set[int]]()
    for batch in loader.batches(0, 12 * loader.steps_per_epoch):
        fields = batch.fields[:, 0].numpy()
        np.testing.assert_array_equal(batch.text[:, 0].numpy(), text[batch.rows, fields])
        for row, field in zip(batch.rows.tolist(), fields.tolist(), strict=True):
            drawn.setdefault(row, set()).add(field)
    assert drawn[3] == {1}
    assert drawn[4] == {0}
    assert {0, 1} in drawn.values()
    assert not any(-1 in fields for fields in drawn.values())


def test_the_windows_and_the_batch_take_no_more_than_the_memory(source: Source) -> None:
    for memory in (SMALL, LARGE):
        assert make_loader(source, memory).nbytes <= memory


def test_too_little_memory_is_refused_by_the_name_of_the_setting(source: Source) -> None:
    with pytest.raises(TrainingError, match=r"align\.memory_mb = 0 does not hold two chunks"):
        make_loader(source, 1000)


def test_a_batch_larger_than_the_rows_is_refused(source: Source) -> None:
    with pytest.raises(TrainingError, match=r"align\.batch_size = 198 is more than the 197 rows"):
        make_loader(source, LARGE, batch_size=198)


def test_a_damaged_chunk_stops_the_loader_with_its_name(source: Source) -> None:
    file = on_disk(source.columns.image.features_file(3))
    file.write_bytes(file.read_bytes()[:-7])
    loader = make_loader(source)
    with pytest.raises(StoreCorruptError, match=r"features/c/3/0 is damaged"):
        list(loader.batches(0, loader.steps_per_epoch))


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_the_batches_of_several_processes_together_are_those_of_one(
    source: Source, memory: int
) -> None:
    whole = make_loader(source, memory, captions_per_image=1)
    steps = 2 * whole.steps_per_epoch + 1
    expected = copies(whole, 0, steps)
    shares = [
        copies(make_loader(source, memory, captions_per_image=1, rank=rank, ranks=3), 0, steps)
        for rank in range(3)
    ]
    for parts, batch in zip(zip(*shares, strict=True), expected, strict=True):
        assert all(len(part.rows) == 8 for part in parts)
        np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), batch.rows)
        for name in TENSORS:
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(batch, name))


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(source: Source) -> None:
    with pytest.raises(TrainingError, match=r"batch_size = 24 cannot .* among 5 processes"):
        make_loader(source, rank=0, ranks=5)
