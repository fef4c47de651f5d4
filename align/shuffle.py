"""How well an order shuffles: how often rows that stand together on disk meet in a batch."""

from dataclasses import dataclass

import numpy as np

from align.order import Order


@dataclass(frozen=True)
class ShuffleQuality:
    """The probability that two rows of one batch come from the same chunk of the store."""

    observed: float
    """In the steps that were looked at."""
    expected: float
    """If the rows of a window were drawn in any order."""
    whole_store: float
    """If the rows of the whole store were: no order does better."""


def shuffle_quality(order: Order, steps: int) -> ShuffleQuality:
    """Go through the first steps of an order, without reading any features.

    Rows of one chunk come from the same part of the source: the same shard, perhaps the same site
    or class. In a contrastive batch they are each other's negatives more often than chance has it.

    Args:
        order: Of whole batches of two rows or more.
        steps: How many are looked at.
    """
    size = order.rows_per_chunk
    met = pairs = 0
    for step in range(steps):
        chunks = order.rows(step) // size
        counts = np.unique(chunks, return_counts=True)[1].astype(np.int64)
        met += int((counts * (counts - 1)).sum())
        pairs += len(chunks) * (len(chunks) - 1)
    counts = np.add.reduceat(order.usable, np.arange(0, len(order.usable), size), dtype=np.int64)
    return ShuffleQuality(
        observed=met / pairs,
        expected=_same_chunk(counts, order.chunks_per_window),
        whole_store=_same_chunk(counts, int(np.count_nonzero(counts))),
    )


def _same_chunk(counts: np.ndarray, chunks: int) -> float:
    """Return the probability for two rows of as many chunks of mean fill, drawn in any order."""
    counts = counts[counts > 0]
    rows = counts.mean() * chunks
    within = (counts * (counts - 1)).mean() * chunks
    return float(within / (rows * (rows - 1)))
