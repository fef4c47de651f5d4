"""Whether one number predicts another over a handful of models: correlations with their doubt."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from evaluate.bootstrap import COVERED, Interval, percentile_interval

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
    r = _pearson(first, second)
    width = NormalDist().inv_cdf(0.5 + COVERED / 2) / np.sqrt(n - 3)
    z = np.arctanh(np.clip(r, -1 + 1e-15, 1 - 1e-15))
    every = np.arange(n)
    left_out = [_pearson(first[every != i], second[every != i]) for i in range(n)]
    return Correlation(
        n=n,
        pearson=r,
        pearson_interval=(float(np.tanh(z - width)), float(np.tanh(z + width))),
        spearman=_pearson(_ranks(first), _ranks(second)),
        spearman_interval=_spearman_interval(first, second, resamples=resamples, seed=seed),
        without_one=tuple(left_out),
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
    values = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(first), len(first))
        values.append(_pearson(_ranks(first[drawn]), _ranks(second[drawn])))
    return percentile_interval(np.array(values))


def _pearson(first: Float[np.ndarray, "points"], second: Float[np.ndarray, "points"]) -> float:
    """Return r; 0 where a series is constant, as it may become when points are left out."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Float[np.ndarray, "points"]) -> Float[np.ndarray, "points"]:
    """Return the rank of each value from 1; equal values share the mean of their ranks."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[number]
    return ranks
