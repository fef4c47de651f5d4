"""Images and texts of two stores, rows of several stores, and features in 8 bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from align.chunk_reader import PartInMemory
from align.columns import Columns, JoinedStore, open_columns, select_rows
from align.config import AlignConfig
from align.heads import build_model
from align.loader import MIB, Batch, Loader, LoaderOptions, Source
from align.training_rows import TrainingRows
from features.device.cuda import CPU
from features.errors import TrainingError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.stores.convert import convert_store
from tests.feature_stores import IMAGE, TEXT, as_version_1, make_store, on_disk

SMALL, LARGE = 24_000, 10 * MIB  # bytes: some chunks of the stores below, all of them


def source(path: Path, *, weight: float = 1.0, rows: int = 200, **options: Any) -> Source:
    store = make_store(path, rows=rows, **options)
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.0, holdout_rows=1)
    return Source(columns, selection.train, selection.text_ok, weight=weight)


def options(memory: int = SMALL, **changes: Any) -> LoaderOptions:
    return replace(
        LoaderOptions(batch_size=24, memory_bytes=memory, with_caption_ids=True), **changes
    )


def copied(batch: Batch) -> Batch:
    return replace(batch, image=batch.image.clone(), text=batch.text.clone())


def features(sources: list[Source]) -> tuple[np.ndarray, np.ndarray]:
    """All features of several stores, one behind the other."""
    columns = [each.columns for each in sources]
    return (
        np.concatenate([each.image.read(0, each.store.rows) for each in columns]),
        np.concatenate(
            [
                np.stack([column.read(0, each.store.rows) for column in each.text], axis=1)
                for each in columns
            ]
        ),
    )


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_each_batch_has_rows_of_all_stores_in_proportion_and_their_features(
    tmp_path: Path, memory: int
) -> None:
    sources = [
        source(tmp_path / "a.zarr", weight=1.0, rows=200, seed=1),
        source(tmp_path / "b.zarr", weight=2.0, rows=60, seed=2, bad_images=(7,)),
    ]
    image, text = features(sources)
    loader = Loader(sources, options(memory))
    assert loader.steps_per_epoch == 259 // 24
    seen = np.zeros(260, dtype=int)
    for batch in loader.batches(0, 50):
        assert (batch.rows < 200).sum() == 8
        np.testing.assert_array_equal(batch.image.numpy(), image[batch.rows])
        np.testing.assert_array_equal(batch.text.numpy(), text[batch.rows])
        seen[batch.rows] += 1
    assert seen[207] == 0
    assert seen[:200].min() >= 2  # 400 rows: two passes
    assert np.delete(seen[200:], 7).min() >= 6  # 800 rows, in epochs that drop 11 of 59


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_a_mixture_begins_at_any_step_and_is_shared_out_among_processes(
    tmp_path: Path, memory: int
) -> None:
    sources = [
        source(tmp_path / "a.zarr", weight=1.0, seed=1),
        source(tmp_path / "b.zarr", weight=1.7, rows=100, seed=2),
    ]
    given = options(memory, captions_per_image=1)
    whole = [copied(batch) for batch in Loader(sources, given).batches(0, 20)]
    for first in (1, 7, 19):
        late = next(Loader(sources, given).batches(first, 20))
        np.testing.assert_array_equal(late.rows, whole[first].rows)
        assert torch.equal(late.text, whole[first].text)
    for ranks in (2, 3, 8):
        shares = [Loader(sources, replace(given, rank=rank, ranks=ranks)) for rank in range(ranks)]
        streams = [share.batches(5, 9) for share in shares]
        for step in range(5, 9):
            parts = [next(stream) for stream in streams]
            assert {len(part.rows) for part in parts} == {24 // ranks}
            rows = np.concatenate([part.rows for part in parts])
            np.testing.assert_array_equal(rows, whole[step].rows)
            for name in ("image", "text", "fields", "caption_ids"):
                together = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(together, getattr(whole[step], name))
        keys = [key for share in shares for key in share.keys(3, 24)]
        assert keys == Loader(sources, given).keys(3, 24)
    assert Loader(sources, given).keys(3, 2) == [
        str(sources[0].columns.store.keys(row, row + 1)[0]) for row in whole[3].rows[:2].tolist()
    ]


def test_images_of_one_store_go_with_texts_of_another(tmp_path: Path) -> None:
    images, texts = (make_store(tmp_path / f"{seed}.zarr", seed=seed) for seed in (1, 2))
    columns = Columns.open(JoinedStore(images, texts), AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.0, holdout_rows=1)
    loader = Loader([Source(columns, selection.train, selection.text_ok)], options())
    image = images.column(f"image/{IMAGE}").read(0, 200)
    text = texts.column(f"text/{TEXT}/long").read(0, 200)
    for batch in loader.batches(0, 3):
        np.testing.assert_array_equal(batch.image.numpy(), image[batch.rows])
        np.testing.assert_array_equal(batch.text[:, 1].numpy(), text[batch.rows])


def other_keys(store: FeatureStore, keys: list[str]) -> FeatureStore:
    """The store with other keys in it, as if it had been made of them."""
    writable = zarr.open_group(store.path, mode="r+")
    writable["key"][:] = np.array(keys, dtype=np.dtypes.StringDType())  # type: ignore[index]
    writable.attrs["keys_sha256"] = "0" * 64
    as_version_1(on_disk(store.path))
    return FeatureStore.open(store.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda keys: [*keys[:7], "x", *keys[8:]],
            r"row 7 is 'shard/000007' .* and 'x' .* other k",
        ),
        (lambda keys: [*keys[1:], keys[0]], r"row 0 is .* and 'shard/000001' .* `sail reorder"),
    ],
)
def test_stores_of_other_keys_are_refused_by_the_first_that_differs(
    tmp_path: Path, change: object, words: str
) -> None:
    images, texts = make_store(tmp_path / "i.zarr"), make_store(tmp_path / "t.zarr")
    changed = other_keys(texts, change(texts.keys().tolist()))  # type: ignore[operator]
    with pytest.raises(TrainingError, match=words):
        Columns.open(JoinedStore(images, changed), AlignConfig(), IMAGE, TEXT)


def test_a_store_that_ends_early_or_has_other_chunks_is_refused(tmp_path: Path) -> None:
    images, texts = make_store(tmp_path / "i.zarr"), make_store(tmp_path / "t.zarr", rows=90)
    with pytest.raises(TrainingError, match=r"row 90 is 'shard/000090' .* and beyond its end in"):
        Columns.open(JoinedStore(images, texts), AlignConfig(), IMAGE, TEXT)
    coarse = make_store(tmp_path / "c.zarr", rows_per_chunk=32)
    with pytest.raises(TrainingError, match=r"16 rows per chunk, .* has 32"):
        Columns.open(JoinedStore(images, coarse), AlignConfig(), IMAGE, TEXT)


def test_stores_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    sources = [
        source(tmp_path / "a.zarr"),
        source(tmp_path / "b.zarr", fields=("one",)),
        source(tmp_path / "c.zarr", weight=0.001),
        source(tmp_path / "d.zarr", rows=10),
    ]
    with pytest.raises(TrainingError, match=r"\[1, 2\] captions per image"):
        Loader(sources[:2], options())
    Loader(sources[:2], options(captions_per_image=1))
    with pytest.raises(TrainingError, match=r"weight of .*c\.zarr in align\.mix gives it no row"):
        Loader([sources[0], sources[2]], options())
    with pytest.raises(TrainingError, match=r"of which 12 come .* more than the 10 rows of .*d\.z"):
        Loader([sources[0], sources[3]], options())


def test_features_of_another_width_or_encoder_are_not_mixed(tmp_path: Path) -> None:
    first, wider = make_store(tmp_path / "a.zarr"), make_store(tmp_path / "b.zarr", image_dim=9)
    stores = [first, wider]
    with pytest.raises(TrainingError, match=r"b\.zarr/image/eye has dim = 9, but .*a\.zarr"):
        open_columns(stores, AlignConfig(), IMAGE, TEXT)


def test_held_out_rows_come_from_all_stores_in_proportion(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a.zarr"), make_store(tmp_path / "b.zarr", fields=("one",))]
    config = AlignConfig(
        batch_size=24, holdout=0.3, holdout_rows=30, memory_mb=1, captions_per_image=1
    )
    columns = open_columns(stores, config, IMAGE, TEXT)
    rows = TrainingRows.select(columns, [1.0, 2.0], config)
    loader, heldout = rows.loader(config, seed=0, device=CPU), rows.heldout(config, CPU)
    assert heldout is not None
    assert len(heldout) == 30
    torch.manual_seed(0)
    scores = heldout.score(build_model({"kind": "linear", "dim": 4}, image_dim=8, text_dim=10))
    for k in (1, 5, 10):  # means over 10 images with two captions and 20 with one
        right = 40 * scores[f"recall@{k}/text_to_image"]
        assert right == pytest.approx(round(right))
    assert next(loader.batches(0, 1)).text.shape[1] == 1


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_batches_of_8_bit_features_are_those_that_the_store_stands_for(
    tmp_path: Path, memory: int
) -> None:
    first = source(tmp_path / "a.zarr", bad_images=(3,))
    convert_store(first.columns.store.path, tmp_path / "b.zarr", "int8", StopRequest())
    store = FeatureStore.open(tmp_path / "b.zarr")
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    sources = [replace(first, columns=columns), first]
    image, text = features(sources)
    loader = Loader(sources, options(memory))
    assert loader.nbytes <= memory
    for batch in loader.batches(0, 20):
        np.testing.assert_array_equal(batch.image.numpy(), image[batch.rows])
        np.testing.assert_array_equal(batch.text.numpy(), text[batch.rows])


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_rows_kept_on_the_host_reach_the_batch_of_another_device(dtype: type) -> None:
    other = torch.device("cpu", 0)  # another name: rows are copied
    rows = PartInMemory((50, 4), np.dtype(dtype), CPU, other)
    values = torch.arange(200).view(50, 4) % 100
    rows.values.copy_(values)
    if rows.scale is not None:
        rows.scale.fill_(0.5)
    for chosen in (np.array([3, 1, 49]), np.arange(50)[::-1]):
        out = torch.empty(len(chosen), 4, dtype=torch.float16)
        rows.gather(chosen, out)
        expected = values[chosen.copy()] * (0.5 if dtype == np.int8 else 1)
        assert torch.equal(out, expected.half())
