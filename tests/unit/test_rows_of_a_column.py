"""Rows of a column by their numbers, whatever their order and the chunks they lie in."""

from pathlib import Path

import numpy as np

from tests.feature_stores import IMAGE, make_store

ROWS = 9000  # more than two blocks


def test_rows_come_in_the_order_in_which_they_are_asked_for(tmp_path: Path) -> None:
    column = make_store(tmp_path / "s.zarr", rows=ROWS, rows_per_chunk=700).column(f"image/{IMAGE}")
    every = column.read(0, ROWS)
    asked = np.random.default_rng(0).integers(0, ROWS, 500)
    np.testing.assert_array_equal(column.rows_at(asked), every[asked])
    assert column.rows_at(asked[:0]).shape == (0, column.dim)
    in_order = np.unique(asked)
    np.testing.assert_array_equal(np.concatenate(list(column.blocks(in_order))), every[in_order])
    assert list(column.blocks(asked[:0])) == []


def test_rows_that_are_quarantined_are_not_among_those_that_are_ok(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=40, bad_images=(3, 39))
    assert store.column(f"image/{IMAGE}").ok_rows().tolist() == [*range(3), *range(4, 39)]
