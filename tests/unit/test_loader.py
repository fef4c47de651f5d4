"""Batches hold the features of the rows they name, within the memory they were given."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Int64

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.loader import MIB, Batch, Loader, LoaderOptions, Source
from features.errors import StoreCorruptError, TrainingError
from features.storage import chunks as scattered
from features.storage.column import Column
from tests.feature_stores import IMAGE, TEXT, make_store, on_disk

SMALL, LARGE = 9_000, 10 * MIB  # bytes: some chunks of the store below, all of it


def make_loader(path: Path, *, memory: int = SMALL, holdout: float = 0.0, **options: int) -> Loader:
    store = make_store(
        path / "s.zarr",
        bad_images=(0, 17),
        bad_captions=((3, 0), (4, 1), (5, 0), (5, 1)),
        captions={"bare": ["red", "blue"] * 100, "long": [f"row {row}" for row in range(200)]},
    )
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=holdout, holdout_rows=10)
    settings = LoaderOptions(
        batch_size=options.pop("batch_size", 24),
        memory_bytes=memory,
        with_caption_ids=True,
        captions_per_image=options.pop("captions_per_image", None),
    )
    source = Source(columns, selection.train, selection.text_ok, field_weights=(0.5, 2.0))
    return Loader([source], settings)


def columns_of(loader: Loader) -> Columns:
    return loader.streams[0].source.columns


def copies(loader: Loader, first: int, stop: int) -> list[Batch]:
    """Batches whose memory is not used again."""
    return [
        Batch(
            batch.rows,
            batch.image.clone(),
            batch.text.clone(),
            batch.weights,
            batch.caption_ids,
        )
        for batch in loader.batches(first, stop)
    ]


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_a_batch_holds_the_features_of_its_rows(tmp_path: Path, memory: int) -> None:
    loader = make_loader(tmp_path, memory=memory)
    assert loader.tier == ("device" if memory == LARGE else "streaming")
    image = columns_of(loader).image.read(0, 200)
    text = np.stack([column.read(0, 200) for column in columns_of(loader).text], axis=1)
    for batch in loader.batches(0, 2 * loader.steps_per_epoch):
        np.testing.assert_array_equal(batch.image.numpy(), image[batch.rows])
        np.testing.assert_array_equal(batch.text.numpy(), text[batch.rows])


def test_rows_without_an_image_or_any_caption_are_never_in_a_batch(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, batch_size=1)
    seen = np.concatenate([batch.rows for batch in loader.batches(0, loader.steps_per_epoch)])
    assert sorted(seen) == sorted(set(range(200)) - {0, 17, 5})


def test_a_missing_caption_has_no_weight_and_the_others_their_fields(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, batch_size=1)
    weights = {
        int(batch.rows[0]): batch.weights[0].tolist()
        for batch in loader.batches(0, loader.steps_per_epoch)
    }
    assert weights[3] == [0.0, 2.0]
    assert weights[4] == [0.5, 0.0]
    assert weights[6] == [0.5, 2.0]


def test_caption_ids_are_equal_where_the_words_are(tmp_path: Path) -> None:
    loader = make_loader(tmp_path)
    (batch,) = copies(loader, 0, 1)
    assert batch.caption_ids is not None
    bare, long = batch.caption_ids.T.numpy()
    colour = batch.rows % 2
    np.testing.assert_array_equal(bare[:, None] == bare, colour[:, None] == colour)
    assert len(np.unique(long)) == len(long)


def test_beginning_in_the_middle_gives_the_same_batches_and_reads_only_their_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(tmp_path, captions_per_image=1)
    steps = 2 * loader.steps_per_epoch
    whole = copies(loader, 0, steps)
    read = list[int]()
    original = Column.read_into

    def read_into(column: Column, chunk: int, buffer: np.ndarray, *, verify: bool) -> int:
        read.append(chunk)
        return original(column, chunk, buffer, verify=verify)

    monkeypatch.setattr(Column, "read_into", read_into)
    resumed = make_again(loader)
    late = copies(resumed, steps - 1, steps)[0]
    assert (late.rows == whole[-1].rows).all()
    for name in ("image", "text", "weights", "caption_ids"):
        assert torch.equal(getattr(late, name), getattr(whole[-1], name))
    windows = list(resumed.streams[0].order.windows(steps - 1, steps))
    assert sorted(set(read)) == sorted(np.concatenate([window.chunks for window in windows]))


def make_again(loader: Loader) -> Loader:
    return Loader([stream.source for stream in loader.streams], loader.options)


def test_a_store_that_fits_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(tmp_path, memory=LARGE)
    read = list[int]()
    original = Column.read_into

    def read_into(column: Column, chunk: int, buffer: np.ndarray, *, verify: bool) -> int:
        read.append(chunk)
        return original(column, chunk, buffer, verify=verify)

    monkeypatch.setattr(Column, "read_into", read_into)
    list(loader.batches(0, 3 * loader.steps_per_epoch))
    assert len(read) == 3 * columns_of(loader).image.num_chunks  # three columns


def test_a_chunk_read_in_small_pieces_gives_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_loader(tmp_path)
    monkeypatch.setattr("align.chunk_reader.PIECE_BYTES", 3 * 2 * columns_of(whole).image.dim)
    in_pieces = make_again(whole)
    steps = whole.steps_per_epoch
    for one, other in zip(copies(whole, 0, steps), copies(in_pieces, 0, steps), strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.text, other.text)


def test_rows_come_to_the_same_places_where_the_system_cannot_put_them_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(tmp_path)
    straight: list[bool] = []
    original = Column.scatter

    def scatter(
        column: Column, chunk: int, rows: np.ndarray, places: Int64[np.ndarray, "rows"]
    ) -> bool:
        straight.append(original(column, chunk, rows, places))
        return straight[-1]

    monkeypatch.setattr(Column, "scatter", scatter)
    steps = loader.steps_per_epoch
    copies(loader, 0, steps)
    assert not straight  # every crc32c is looked at first
    one = copies(loader, steps, 2 * steps)
    assert set(straight) == {scattered.PREADV is not None}
    monkeypatch.setattr(scattered, "PREADV", None)
    for batch, same in zip(one, copies(loader, steps, 2 * steps), strict=True):
        assert torch.equal(batch.image, same.image)
        assert torch.equal(batch.text, same.text)


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    loader = make_loader(tmp_path)
    monkeypatch.setattr("align.chunk_reader.PIECE_BYTES", 3 * 2 * columns_of(loader).image.dim)
    file = Path(str(columns_of(loader).image.features_file(1)))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StoreCorruptError, match=message) as caught:
        copies(make_again(loader), 0, loader.steps_per_epoch)
    assert str(file) in str(caught.value)


def test_drawn_captions_are_ones_that_can_be_used_and_change_from_step_to_step(
    tmp_path: Path,
) -> None:
    loader = make_loader(tmp_path, captions_per_image=1)
    drawn = dict[int, set[float]]()
    for batch in loader.batches(0, 12 * loader.steps_per_epoch):
        assert batch.text.shape[1] == 1
        for row, weight in zip(batch.rows.tolist(), batch.weights[:, 0].tolist(), strict=True):
            drawn.setdefault(row, set()).add(weight)
    assert drawn[3] == {2.0}
    assert drawn[4] == {0.5}
    assert {0.5, 2.0} in drawn.values()
    assert not any(0.0 in weights for weights in drawn.values())


def test_the_windows_and_the_batch_take_no_more_than_the_memory(tmp_path: Path) -> None:
    for memory in (SMALL, LARGE):
        loader = make_loader(tmp_path / str(memory), memory=memory)
        assert loader.nbytes <= memory


def test_too_little_memory_is_refused_by_the_name_of_the_setting(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"align\.memory_mb = 0 does not hold two chunks"):
        make_loader(tmp_path, memory=1000)


def test_a_batch_larger_than_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"align\.batch_size = 198 is more than the 197 rows"):
        make_loader(tmp_path, memory=LARGE, batch_size=198)


def test_a_damaged_chunk_stops_the_loader_with_its_name(tmp_path: Path) -> None:
    loader = make_loader(tmp_path)
    file = on_disk(columns_of(loader).image.features_file(3))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(StoreCorruptError, match=r"features/c/3/0 is damaged"):
        list(loader.batches(0, loader.steps_per_epoch))


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_the_batches_of_several_processes_together_are_those_of_one(
    tmp_path: Path, memory: int
) -> None:
    whole = make_loader(tmp_path, memory=memory, captions_per_image=1)
    steps = 2 * whole.steps_per_epoch + 1
    expected = copies(whole, 0, steps)
    shares = [copies(share_of(whole, rank, 3), 0, steps) for rank in range(3)]
    for parts, batch in zip(zip(*shares, strict=True), expected, strict=True):
        assert all(len(part.rows) == 8 for part in parts)
        np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), batch.rows)
        for name in ("image", "text", "weights", "caption_ids"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(batch, name))


def share_of(loader: Loader, rank: int, ranks: int) -> Loader:
    options = replace(loader.options, rank=rank, ranks=ranks)
    return Loader([stream.source for stream in loader.streams], options)


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(tmp_path: Path) -> None:
    loader = make_loader(tmp_path)
    with pytest.raises(TrainingError, match=r"batch_size = 24 cannot .* among 5 processes"):
        share_of(loader, 0, 5)
