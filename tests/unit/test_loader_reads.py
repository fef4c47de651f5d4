"""What a loader hands out after a read that failed, and which captions it draws."""

from pathlib import Path

import numpy as np
import pytest

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.loader import MIB, Loader, LoaderOptions, Source
from features.errors import StoreCorruptError
from features.store import FeatureStore
from tests.feature_stores import IMAGE, TEXT, make_store

SMALL, LARGE = 9_000, 10 * MIB  # bytes: some chunks of the stores below, all of them
ROWS, ROWS_PER_CHUNK = 200, 16


def make_loader(store: FeatureStore, memory: int, *, captions: int | None = None) -> Loader:
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.0, holdout_rows=10)
    source = Source(columns, selection.train, selection.text_ok)
    options = LoaderOptions(batch_size=20, memory_bytes=memory, captions_per_image=captions)
    loader = Loader([source], options)
    assert loader.tier == ("device" if memory == LARGE else "streaming")
    return loader


def features(store: FeatureStore) -> tuple[np.ndarray, np.ndarray]:
    """The images and captions of all rows, as the store gives them."""
    columns = [store.column(f"text/{TEXT}/{field}") for field in store.fields]
    text = [column.read(0, store.rows) for column in columns]
    return store.column(f"image/{IMAGE}").read(0, store.rows), np.stack(text, axis=1)


@pytest.mark.parametrize("memory", [SMALL, LARGE])
@pytest.mark.parametrize("chunk", [0, ROWS // ROWS_PER_CHUNK])
@pytest.mark.parametrize("column", [f"image/{IMAGE}", f"text/{TEXT}/long"])
def test_a_read_that_failed_is_made_again_and_nothing_unread_is_handed_out(
    tmp_path: Path, memory: int, chunk: int, column: str
) -> None:
    store = make_store(tmp_path / "s.zarr", rows=ROWS, rows_per_chunk=ROWS_PER_CHUNK)
    image, text = features(store)
    file = tmp_path / "s.zarr" / column / "features" / "c" / str(chunk) / "0"
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    loader = make_loader(store, memory)
    steps = loader.steps_per_epoch
    for _ in range(2):  # as damaged as before
        with pytest.raises(StoreCorruptError):
            list(loader.batches(0, steps))
    file.write_bytes(good)  # as after `sail repair`, or when a network is there again
    seen = []
    for batch in loader.batches(0, 2 * steps):
        np.testing.assert_array_equal(batch.image.numpy(), image[batch.rows])
        np.testing.assert_array_equal(batch.text.numpy(), text[batch.rows])
        seen.append(batch.rows)
    assert sorted(np.concatenate(seen[:steps])) == list(range(ROWS))


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_a_loader_left_at_any_moment_begins_again_with_what_is_on_disk(
    tmp_path: Path, memory: int
) -> None:
    store = make_store(tmp_path / "s.zarr", rows=ROWS, rows_per_chunk=ROWS_PER_CHUNK)
    image, text = features(store)
    loader = make_loader(store, memory)
    for step in range(4):
        batches = loader.batches(step, 9)
        next(batches)
        batches.close()
    for batch in loader.batches(0, loader.steps_per_epoch):
        np.testing.assert_array_equal(batch.image.numpy(), image[batch.rows])
        np.testing.assert_array_equal(batch.text.numpy(), text[batch.rows])


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_drawn_captions_stand_in_the_order_of_their_fields(tmp_path: Path, memory: int) -> None:
    fields = ("bare", "short", "long", "longest")
    store = make_store(tmp_path / "s.zarr", rows=ROWS, fields=fields)
    _, text = features(store)
    loader = make_loader(store, memory, captions=2)
    drawn = set[tuple[int, ...]]()
    for batch in loader.batches(0, 2 * loader.steps_per_epoch):
        chosen = batch.fields.numpy()
        assert (chosen[:, 0] < chosen[:, 1]).all()
        for place, row in enumerate(batch.rows):
            np.testing.assert_array_equal(batch.text[place].numpy(), text[row, chosen[place]])
        drawn |= {tuple(pair) for pair in chosen.tolist()}
    assert len(drawn) == 6  # every pair of four fields
