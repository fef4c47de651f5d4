"""Bootstrap intervals over the test items."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from evaluate.items import Items

Interval = tuple[float, float]
COVERED = 0.95
DRAWS_AT_ONCE = 1 << 24


def ratio_interval(
    hits: Int[np.ndarray, "items"],
    counts: Int[np.ndarray, "items"] | None = None,
    *,
    resamples: int,
    seed: int,
) -> Interval | None:
    """Return the 95 % interval of Σ hits / Σ counts when the items are drawn anew.

    Args:
        hits: What each item got right: 0 or 1, or of an image with several captions how many.
        counts: Out of how many; 1 each if not given.
        resamples: How often the items are drawn, with replacement; 0 for no interval.
        seed: Of the drawing.

    Returns:
        The 2.5th and 97.5th percentile, or None without items or resamples.

    Reference:
        Efron 1979, Bootstrap Methods: Another Look at the Jackknife (the percentile interval).
    """
    counts = np.ones_like(hits) if counts is None else counts
    items = np.stack([np.zeros_like(hits), hits, counts], axis=1)
    return _interval(items, _ratio, resamples=resamples, seed=seed)


def mean_per_class_interval(
    labels: Int[np.ndarray, "items"],
    correct: Bool[np.ndarray, "items"],
    *,
    resamples: int,
    seed: int,
) -> Interval | None:
    """Return the 95 % interval of the mean over classes of the share that is correct.

    A class of which a resample has no item does not count in its mean.
    """
    items = np.stack([labels, correct.astype(labels.dtype), np.ones_like(labels)], axis=1)
    return _interval(items, _mean_over_classes, resamples=resamples, seed=seed)


def paired_interval(first: Items, second: Items, *, resamples: int, seed: int) -> Interval | None:
    """Return the 95 % interval of the second number minus the first, over the same items.

    Both numbers are of the items of one resample, so that what makes an item easy or hard for both
    is not counted as a difference. That is narrower than two intervals side by side suggest.

    Args:
        first: Outcomes of one run.
        second: Outcomes of the other on the same items in the same order.
        resamples: How often the items are drawn, with replacement; 0 for no interval.
        seed: Of the drawing.
    """
    columns = [
        np.zeros_like(first.hits) if first.classes is None else first.classes,
        *(part for items in (first, second) for part in (items.hits, _counts(items))),
    ]
    mean = _ratio if first.classes is None else _mean_over_classes

    def difference(
        drawn: Int[np.ndarray, "resamples kinds"], kinds: Int[np.ndarray, "kinds 5"]
    ) -> Float[np.ndarray, "resamples"]:
        one, two = (mean(drawn, kinds[:, [0, place, place + 1]]) for place in (1, 3))
        difference: np.ndarray = two - one
        return difference

    return _interval(np.stack(columns, axis=1), difference, resamples=resamples, seed=seed)


def percentile_interval(values: Float[np.ndarray, "resamples"]) -> Interval:
    """Return the 2.5th and 97.5th percentile of what a number was in each resample."""
    tail = (1 - COVERED) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _counts(items: Items) -> Int[np.ndarray, "items"]:
    return np.ones_like(items.hits) if items.counts is None else items.counts


def _ratio(
    drawn: Int[np.ndarray, "resamples kinds"], kinds: Int[np.ndarray, "kinds 3"]
) -> Float[np.ndarray, "resamples"]:
    """Return Σ hits / Σ counts; kinds are (class, hits, counts)."""
    ratios: np.ndarray = (drawn @ kinds[:, 1]) / np.maximum(drawn @ kinds[:, 2], 1)
    return ratios


def _mean_over_classes(
    drawn: Int[np.ndarray, "resamples kinds"], kinds: Int[np.ndarray, "kinds 3"]
) -> Float[np.ndarray, "resamples"]:
    """Return the mean of Σ hits / Σ counts over the classes that were drawn."""
    _, starts = np.unique(kinds[:, 0], return_index=True)  # kinds are sorted by class
    total = np.add.reduceat(drawn * kinds[:, 2], starts, axis=1)
    right = np.add.reduceat(drawn * kinds[:, 1], starts, axis=1)
    shares = right / np.maximum(total, 1)
    means: np.ndarray = shares.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)
    return means


def _interval(
    items: Int[np.ndarray, "items facts"],
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    resamples: int,
    seed: int,
) -> Interval | None:
    """Draw how often each kind of item comes, which is all that the statistic depends on.

    A million images have but a handful of kinds (right or wrong, of which class), so that this
    costs next to nothing and is the ordinary bootstrap all the same.
    """
    if not len(items) or not resamples:
        return None
    kinds, frequency = np.unique(items, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // len(kinds))
    values = [
        statistic(
            generator.multinomial(
                len(items), frequency / len(items), size=min(step, resamples - start)
            ),
            kinds,
        )
        for start in range(0, resamples, step)
    ]
    return percentile_interval(np.concatenate(values))
