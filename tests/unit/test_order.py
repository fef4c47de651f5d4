"""The order of the rows: what is random in it, and what is not read."""

import numpy as np

from align.order import Order


def order(seed: int = 0, chunks_per_window: int = 3, rows: int = 100) -> Order:
    return Order(
        np.ones(rows, dtype=bool),
        rows_per_chunk=10,
        chunks_per_window=chunks_per_window,
        batch_size=5,
        seed=seed,
    )


def rows_of(order: Order, epoch: int) -> list[int]:
    first = epoch * order.steps_per_epoch
    return [row for step in range(first, first + order.steps_per_epoch) for row in order.rows(step)]


def test_epochs_and_seeds_have_different_orders() -> None:
    seen = [rows_of(order(), 0), rows_of(order(), 1), rows_of(order(seed=1), 0)]
    assert all(sorted(rows) == list(range(100)) for rows in seen)
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_the_same_seed_gives_the_same_order() -> None:
    assert rows_of(order(), 2) == rows_of(order(), 2)


def test_a_batch_mixes_rows_of_all_chunks_of_its_window() -> None:
    all_chunks = order(chunks_per_window=10)
    first_half = np.concatenate([all_chunks.rows(step) for step in range(10)])
    assert len(np.unique(first_half // 10)) == 10


def test_windows_before_the_first_step_are_not_visited() -> None:
    everything = list(order().windows(0, 20))
    late = list(order().windows(19, 20))
    assert len(everything) == 4
    assert len(late) == 1
    assert late[0].chunks.tolist() == everything[-1].chunks.tolist()


def test_a_chunk_without_a_usable_row_is_never_visited() -> None:
    usable = np.ones(100, dtype=bool)
    usable[20:30] = False
    it = Order(usable, rows_per_chunk=10, chunks_per_window=2, batch_size=5, seed=0)
    assert 2 not in np.concatenate([window.chunks for window in it.windows(0, 18)])


def test_windows_that_hold_everything_keep_their_chunks_in_place() -> None:
    resident = order(chunks_per_window=10)
    assert resident.is_resident
    assert {tuple(window.chunks) for window in resident.windows(0, 60)} == {tuple(range(10))}


def test_a_process_reads_little_more_than_its_share_of_the_chunks() -> None:
    shares = [
        Order(
            np.ones(960, dtype=bool),
            rows_per_chunk=10,
            chunks_per_window=32,
            batch_size=64,
            seed=0,
            places=range(16 * rank, 16 * (rank + 1)),
        )
        for rank in range(4)
    ]
    read = [sum(len(window.chunks) for window in share.windows(0, 15)) for share in shares]
    assert sum(read) <= 96 + 3 * 3  # a chunk at the edge of two shares is read by both
    assert max(read) <= 96 / 4 + 2 * 3


def test_no_row_of_a_store_that_is_kept_whole_is_dropped_much_more_often_than_another() -> None:
    it = Order(
        np.ones(90, dtype=bool), rows_per_chunk=10, chunks_per_window=9, batch_size=16, seed=0
    )
    windows = it.windows(0, 5 * 200)
    rows = np.concatenate([it.store_rows(window, window.positions) for window in windows])
    seen = np.bincount(rows, minlength=90)
    assert seen.sum() == 200 * 80
    np.testing.assert_allclose(seen / 200, 80 / 90, atol=0.1)  # four standard deviations
