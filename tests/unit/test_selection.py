"""Which rows are trained on and which are held out."""

from pathlib import Path

import numpy as np
import pytest

from align.columns import Columns, below_fraction, select_rows
from align.config import AlignConfig, LossConfig
from features.errors import StoreError, TrainingError
from features.storage.rows import key_hashes
from tests.feature_stores import IMAGE, TEXT, make_store

KEYS = [f"shard/{number}" for number in range(4000)]
HELD_OF_SIXTY = ["shard/21", "shard/38"]


def held_out(keys: list[str], fraction: float) -> np.ndarray:
    return below_fraction(key_hashes(keys, len(keys)), fraction)


def test_the_held_out_keys_are_the_same_in_any_order() -> None:
    mask = held_out(KEYS, 0.1)
    shuffled = np.random.default_rng(0).permutation(len(KEYS))
    again = held_out([KEYS[number] for number in shuffled], 0.1)
    np.testing.assert_array_equal(again, mask[shuffled])


def test_the_held_out_keys_do_not_change_with_the_version_of_the_program() -> None:
    held = [
        key for key, is_held in zip(KEYS[:60], held_out(KEYS[:60], 0.05), strict=True) if is_held
    ]
    assert held == HELD_OF_SIXTY


def test_a_larger_fraction_keeps_what_a_smaller_one_held_out() -> None:
    small, large = held_out(KEYS, 0.05), held_out(KEYS, 0.2)
    assert large[small].all()
    assert abs(small.mean() - 0.05) < 0.015
    assert abs(large.mean() - 0.2) < 0.03


def test_every_row_is_trained_on_held_out_or_counted_as_skipped(tmp_path: Path) -> None:
    store = make_store(
        tmp_path / "s.zarr", bad_images=(0, 1), bad_captions=((5, 0), (6, 0), (6, 1))
    )
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.2, holdout_rows=1000)
    assert selection.skipped == {"image: not an image": 2, "no caption that can be used": 1}
    assert selection.train.sum() + len(selection.heldout) + 3 == 200
    assert not selection.train[selection.heldout].any()
    assert selection.train[5] or 5 in selection.heldout


def test_no_more_rows_are_scored_than_asked_for_and_none_of_the_held_out_is_trained_on(
    tmp_path: Path,
) -> None:
    columns = Columns.open(make_store(tmp_path / "s.zarr"), AlignConfig(), IMAGE, TEXT)
    all_of_them = select_rows(columns, holdout=0.3, holdout_rows=1000)
    few = select_rows(columns, holdout=0.3, holdout_rows=5)
    assert len(few.heldout) == 5
    assert set(few.heldout) < set(all_of_them.heldout)
    np.testing.assert_array_equal(few.train, all_of_them.train)


def test_fewer_rows_are_among_more_of_them_and_the_held_out_stay(tmp_path: Path) -> None:
    columns = Columns.open(make_store(tmp_path / "s.zarr"), AlignConfig(), IMAGE, TEXT)
    few, more, every = (
        select_rows(columns, holdout=0.2, holdout_rows=1000, rows=rows) for rows in (20, 90, None)
    )
    assert (few.train.sum(), more.train.sum()) == (20, 90)
    assert more.train[few.train].all()
    assert every.train[more.train].all()
    np.testing.assert_array_equal(few.heldout, every.heldout)


def test_more_rows_than_there_are_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = Columns.open(make_store(tmp_path / "s.zarr"), AlignConfig(), IMAGE, TEXT)
    for rows in (150, 1000):
        assert caplog.text == ""
        selection = select_rows(columns, holdout=0.2, holdout_rows=10, rows=rows)
    assert 150 < selection.train.sum() < 200
    assert f"asks for 1000 rows of {columns.store.path}, which has {selection.train.sum()}" in (
        caplog.text
    )


def test_a_store_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=4, bad_images=(0, 1, 2, 3))
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    with pytest.raises(TrainingError, match=r"No row of .* is left to train on: 0 are held out"):
        select_rows(columns, holdout=0.0, holdout_rows=10)


def test_caption_fields_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=4)
    with pytest.raises(TrainingError, match=r"align\.fields names \['middle'\].*'bare', 'long'"):
        Columns.open(store, AlignConfig(fields=("middle",)), IMAGE, TEXT)
    weights = AlignConfig(loss=LossConfig(field_weights={"middle": 2.0}))
    with pytest.raises(TrainingError, match=r"align\.loss\.field_weights names \['middle'\]"):
        Columns.open(store, weights, IMAGE, TEXT)


def test_caption_fields_that_all_weigh_nothing_are_refused(tmp_path: Path) -> None:
    weights = LossConfig(field_weights={"bare": 0, "long": 0})
    with pytest.raises(TrainingError, match=r"gives all caption fields.* the weight 0"):
        Columns.open(make_store(tmp_path / "s.zarr"), AlignConfig(loss=weights), IMAGE, TEXT)


def test_a_fraction_that_holds_no_row_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = Columns.open(make_store(tmp_path / "s.zarr"), AlignConfig(), IMAGE, TEXT)
    assert not len(select_rows(columns, holdout=1e-9, holdout_rows=5).heldout)
    assert "align.holdout = 1e-09 keeps no row of" in caplog.text


def test_an_encoder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=4)
    with pytest.raises(StoreError, match="no column 'image/ear'"):
        Columns.open(store, AlignConfig(), "ear", TEXT)
