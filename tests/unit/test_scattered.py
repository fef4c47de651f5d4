"""Rows of a chunk that the system puts to their places, and when it is left to others."""

from pathlib import Path

import numpy as np
import pytest

from features.storage import chunks as scattered
from features.storage.chunks import scatter_rows, write_chunk

ROWS, DIM = 2500, 24  # more rows than the system takes at once


def chunk_file(folder: Path) -> tuple[Path, np.ndarray]:
    values = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float16)
    write_chunk(folder / "chunk", values, beside=folder / "chunk")
    return folder / "chunk", values


@pytest.mark.skipif(scattered.PREADV is None, reason="this system has no preadv")
def test_each_row_comes_to_its_place_and_no_other_changes(tmp_path: Path) -> None:
    file, values = chunk_file(tmp_path)
    rows = np.full((ROWS + 500, DIM), 7, dtype=np.float16)
    places = np.random.default_rng(1).permutation(ROWS + 500)[:ROWS]
    assert scatter_rows(file, rows, places)
    assert np.array_equal(rows[places], values)
    others = np.setdiff1d(np.arange(len(rows)), places)
    assert (rows[others] == 7).all()


@pytest.mark.parametrize("damage", ["cut off", "longer", "missing"])
def test_a_file_that_is_not_whole_is_left_to_those_who_say_why(damage: str, tmp_path: Path) -> None:
    file, _ = chunk_file(tmp_path)
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-1] if damage == "cut off" else content + b"0")
    rows = np.zeros((ROWS, DIM), dtype=np.float16)
    assert not scatter_rows(file, rows, np.arange(ROWS))


@pytest.mark.skipif(scattered.PREADV is None, reason="this system has no preadv")
@pytest.mark.parametrize("outside", [-1, ROWS])
def test_a_place_outside_is_refused_before_anything_is_read(outside: int, tmp_path: Path) -> None:
    file, _ = chunk_file(tmp_path)
    rows, places = np.zeros((ROWS, DIM), dtype=np.float16), np.arange(ROWS)
    places[5] = outside
    with pytest.raises(IndexError, match="are not all in 2500 rows"):
        scatter_rows(file, rows, places)
    assert not rows.any()


@pytest.mark.skipif(scattered.PREADV is None, reason="this system has no preadv")
def test_memory_that_is_no_row_behind_the_other_is_refused(tmp_path: Path) -> None:
    file, _ = chunk_file(tmp_path)
    rows = np.zeros((ROWS, 2 * DIM), dtype=np.float16)[:, ::2]
    with pytest.raises(ValueError, match="C-contiguous"):
        scatter_rows(file, rows, np.arange(ROWS))
