"""What holds for the order of the rows whatever the store, the memory and the batch."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from align.order import Order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    rows = draw(st.integers(1, 60))
    usable = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=bool)
    usable[draw(st.integers(0, rows - 1))] = True
    return Order(
        usable,
        rows_per_chunk=draw(st.integers(1, 12)),
        chunks_per_window=draw(st.integers(1, 8)),
        batch_size=draw(st.integers(1, int(usable.sum()))),
        seed=draw(st.integers(0, 3)),
    )


def steps(order: Order, first: int, stop: int) -> np.ndarray:
    """The rows of some steps, as the windows give them."""
    windows = order.windows(first, stop)
    rows = [order.store_rows(window, window.positions) for window in windows]
    return np.concatenate(rows).reshape(stop - first, len(order.places))


@settings(deadline=None, max_examples=60)
@given(orders())
def test_an_epoch_shows_usable_rows_once_and_drops_less_than_a_batch(order: Order) -> None:
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        rows = steps(order, first, first + order.steps_per_epoch).ravel()
        assert len(np.unique(rows)) == len(rows)
        assert order.usable[rows].all()
        assert order.usable.sum() - len(rows) < order.batch_size


@settings(deadline=None, max_examples=60)
@given(orders(), st.data())
def test_beginning_at_any_step_gives_the_rows_of_the_uninterrupted_order(
    order: Order, data: st.DataObject
) -> None:
    last = 2 * order.steps_per_epoch + 1
    first = data.draw(st.integers(0, last - 1))
    np.testing.assert_array_equal(steps(order, first, last), steps(order, 0, last)[first:])
    np.testing.assert_array_equal(order.rows(first), steps(order, 0, last)[first])


@settings(deadline=None, max_examples=60)
@given(orders())
def test_a_window_never_has_more_chunks_than_fit(order: Order) -> None:
    for window in order.windows(0, order.steps_per_epoch):
        assert len(window.chunks) <= order.chunks_per_window
        assert window.positions.max() < len(window.chunks) * order.rows_per_chunk


@settings(deadline=None, max_examples=60)
@given(orders(), st.data())
def test_the_shares_of_any_number_of_processes_are_the_order_of_one(
    order: Order, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, order.batch_size), max_size=4))
    stops = [*sorted(cuts), order.batch_size]
    shares = [
        share_of(order, range(start, stop))
        for start, stop in zip([0, *stops], stops, strict=False)
        if start < stop
    ]
    last = 2 * order.steps_per_epoch
    first = data.draw(st.integers(0, last - 1))
    together = [steps(share, first, last) for share in shares]
    np.testing.assert_array_equal(np.concatenate(together, axis=1), steps(order, first, last))


def share_of(order: Order, places: range) -> Order:
    return Order(
        order.usable,
        rows_per_chunk=order.rows_per_chunk,
        chunks_per_window=order.chunks_per_window,
        batch_size=order.batch_size,
        seed=order.seed,
        places=places,
    )
