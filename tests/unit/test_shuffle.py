"""The measure of shuffle quality, on orders whose quality is known."""

import numpy as np
import pytest

from align.order import Order
from align.shuffle import shuffle_quality


def order(chunks_per_window: int, *, chunks: int = 40, size: int = 50) -> Order:
    return Order(
        np.ones(chunks * size, dtype=bool),
        rows_per_chunk=size,
        chunks_per_window=chunks_per_window,
        batch_size=100,
        seed=0,
    )


def test_one_chunk_at_a_time_is_no_shuffle_at_all() -> None:
    quality = shuffle_quality(order(1, size=100), steps=20)
    assert quality.observed == quality.expected == 1


def test_a_window_over_everything_is_as_good_as_shuffling_the_store() -> None:
    quality = shuffle_quality(order(40), steps=20)
    assert quality.expected == quality.whole_store == pytest.approx(49 / 1999)
    assert quality.observed <= 1.1 * quality.whole_store


@pytest.mark.parametrize("chunks", [4, 8, 20])
def test_a_window_is_worse_by_as_many_times_as_it_is_smaller_than_the_store(chunks: int) -> None:
    quality = shuffle_quality(order(chunks), steps=20)
    assert quality.expected == pytest.approx(quality.whole_store * 40 / chunks, rel=0.02)
    assert quality.observed == pytest.approx(quality.expected, rel=0.35)
    assert quality.observed <= 1.02 * quality.expected  # lanes take from all parts of a window


def test_rows_that_are_not_used_do_not_count() -> None:
    usable = np.ones(2000, dtype=bool)
    usable[:1000] = False
    half = Order(usable, rows_per_chunk=50, chunks_per_window=10, batch_size=100, seed=0)
    assert shuffle_quality(half, steps=5).whole_store == pytest.approx(49 / 999)
