"""Intervals of numbers, nulls of measures of similarity, and correlations over a few models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from evaluate.results import Items

Interval = tuple[float, float]
COVERED = 0.95
DRAWS_AT_ONCE = 1 << 24


def value_of(items: Items) -> float:
    """Return the number that items sum up to; see `Items`."""
    if items.classes is None:
        return float(items.hits.sum() / items.out_of.sum())
    right = np.bincount(items.classes, weights=items.hits)
    counts = np.bincount(items.classes, weights=items.out_of)
    return float(np.mean(right[counts > 0] / counts[counts > 0]))


def interval_of(items: Items, *, resamples: int, seed: int) -> Interval | None:
    """Return the 95 % interval of that number when the items are drawn anew.

    A class of which a resample has no item does not count in the mean over classes.

    Args:
        items: What each scored.
        resamples: How often the items are drawn, with replacement; 0 for no interval.
        seed: Of the drawing.

    Returns:
        The 2.5th and 97.5th percentile, or None without items or resamples.

    Reference:
        Efron 1979, Bootstrap Methods: Another Look at the Jackknife (the percentile interval).
    """
    columns = np.stack([_classes(items), items.hits, items.out_of], axis=1)
    mean = _ratio if items.classes is None else _mean_over_classes
    return _interval(columns, mean, resamples=resamples, seed=seed)


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
        _classes(first),
        *(part for items in (first, second) for part in (items.hits, items.out_of)),
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


def _classes(items: Items) -> Int[np.ndarray, "items"]:
    return np.zeros_like(items.hits) if items.classes is None else items.classes


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


@runtime_checkable
class PairMeasure(Protocol):
    """A measure of two sets of features of the same rows, ready to be taken."""

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return its value with the rows of the second in an order, or as they are."""


Prepare = Callable[
    [Float[np.ndarray, "rows first_dim"], Float[np.ndarray, "rows second_dim"]], PairMeasure
]
"""Makes a measure ready for the rows of two sets of features."""


@dataclass(frozen=True)
class Calibrated:
    """The value of a measure, and what it is worth."""

    value: float
    interval: Interval | None
    """Of the value, 95 %."""
    null_mean: float | None
    """Mean value over shuffled pairs; None without permutations."""
    calibrated: float | None
    """(value − null mean) / (1 − null mean): 0 for shuffled pairs, 1 for the same features."""
    p_value: float | None
    """Share of the shuffled pairs, the true ones counted in, that come up to the value."""


def calibrate(
    prepare: Prepare,
    features: tuple[Float[np.ndarray, "rows first_dim"], Float[np.ndarray, "rows second_dim"]],
    *,
    permutations: int,
    subsamples: int,
    seed: int,
) -> Calibrated:
    """Take a measure, its null, and its interval.

    Args:
        prepare: The measure.
        features: Both sets, row by row.
        permutations: How often the pairs are shuffled; 0 for no null.
        subsamples: How often half of the rows are drawn; 0 for no interval.
        seed: Of both.

    Reference:
        The permutation null: 2026, Revisiting the Platonic Representation Hypothesis,
        arXiv:2602.14486; the p-value: Phipson and Smyth 2010, (b + 1) / (m + 1).
    """
    measure = prepare(*features)
    value = measure()
    interval = half_sample_interval(prepare, features, value, subsamples=subsamples, seed=seed)
    if not permutations:
        return Calibrated(value, interval, None, None, None)
    null = permutation_null(measure, len(features[0]), permutations=permutations, seed=seed)
    mean = float(null.mean())
    return Calibrated(
        value=value,
        interval=interval,
        null_mean=mean,
        calibrated=(value - mean) / (1 - mean) if mean < 1 else 0.0,
        p_value=float((np.sum(null >= value) + 1) / (permutations + 1)),
    )


def permutation_null(
    measure: PairMeasure, rows: int, *, permutations: int, seed: int
) -> Float64[np.ndarray, "permutations"]:
    """Return the values of a measure over pairs that are shuffled."""
    generator = np.random.default_rng(seed)
    return np.array([measure(generator.permutation(rows)) for _ in range(permutations)])


def half_sample_interval(
    prepare: Prepare,
    features: tuple[Float[np.ndarray, "rows first_dim"], Float[np.ndarray, "rows second_dim"]],
    value: float,
    *,
    subsamples: int,
    seed: int,
) -> Interval | None:
    """Return the 95 % interval of a value from random halves of the rows.

    The bootstrap would be wrong here: a row drawn twice is its own nearest neighbour in both sets
    of features, and its own pair in a kernel, and both lift the value. Halves drawn without
    replacement repeat no row, and vary about their mean as much as the value does about its own
    (the variance of a mean of m of n rows is σ²/m − σ²/n, which is σ²/n at m = n/2). Their mean
    itself may lie elsewhere, since neighbours are sparser; only the deviations from it are used.
    Of so few values percentiles would be too narrow (those of 20 cover 87 %), so that it is their
    standard deviation times Student's t.

    Args:
        prepare: The measure.
        features: Both sets, row by row.
        value: Of all rows; the interval lies about it.
        subsamples: How many halves; of fewer than two there is no interval.
        seed: Of the drawing.

    Reference:
        Politis, Romano, Wolf 1999, Subsampling; Shao and Wu 1989, A General Theory for Jackknife
        Variance Estimation (deleting d of n).
    """
    rows = len(features[0])
    if subsamples < 2:
        return None
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsamples):
        half = np.sort(generator.choice(rows, rows // 2, replace=False))
        values.append(prepare(features[0][half], features[1][half])())
    from scipy.special import stdtrit  # not needed to read a run file, as this module is

    quantile = stdtrit(subsamples - 1, 0.5 + COVERED / 2)
    error = float(np.std(values, ddof=1) * quantile)
    return value - error, value + error


LEAST_POINTS = 4
"""Fisher's interval divides by √(points − 3)."""


@dataclass(frozen=True)
class Correlation:
    """Of two series over the same points."""

    n: int
    """Points."""
    pearson: float
    pearson_interval: Interval
    """95 %, by Fisher's z."""
    spearman: float
    spearman_interval: Interval | None
    """95 %, by bootstrap over the points; None without resamples."""
    without_one: tuple[float, ...]
    """Pearson's r with each point left out in turn: how much hangs on one of them."""


def correlate(
    first: Float[np.ndarray, "points"],
    second: Float[np.ndarray, "points"],
    *,
    resamples: int,
    seed: int,
) -> Correlation | None:
    """Correlate two series; None where that says nothing: a series is constant, or is too short.

    Points are taken to be independent. Those that share an encoder are not, so that over pairs of
    encoders the intervals are too narrow.

    Args:
        first: Values of a measure.
        second: What it should predict.
        resamples: How often the points are drawn for Spearman's interval; 0 for none.
        seed: Of the drawing.

    Reference:
        Fisher 1921: artanh r is about normal with variance 1 / (n − 3).
    """
    n = len(first)
    if n < LEAST_POINTS or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    from scipy.stats import pearsonr

    found = pearsonr(first, second)
    low, high = found.confidence_interval(COVERED)
    every = np.arange(n)
    return Correlation(
        n=n,
        pearson=float(found.statistic),
        pearson_interval=(float(low), float(high)),
        spearman=_spearman(first, second),
        spearman_interval=_spearman_interval(first, second, resamples=resamples, seed=seed),
        without_one=tuple(_pearson(first[every != i], second[every != i]) for i in range(n)),
    )


def _spearman_interval(
    first: Float[np.ndarray, "points"],
    second: Float[np.ndarray, "points"],
    *,
    resamples: int,
    seed: int,
) -> Interval | None:
    if not resamples:
        return None
    generator = np.random.default_rng(seed)
    draws = [generator.integers(0, len(first), len(first)) for _ in range(resamples)]
    return percentile_interval(np.array([_spearman(first[i], second[i]) for i in draws]))


def _spearman(first: Float[np.ndarray, "points"], second: Float[np.ndarray, "points"]) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(first), rankdata(second))


def _pearson(first: Float[np.ndarray, "points"], second: Float[np.ndarray, "points"]) -> float:
    """Return r; 0 where a series is constant, as it may become when points are left out."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
