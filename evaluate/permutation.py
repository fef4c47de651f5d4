"""What a measure of alignment is worth: against pairs that were shuffled, and how sure it is."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int64

from evaluate.bootstrap import COVERED, Interval


@runtime_checkable
class Measure(Protocol):
    """A measure of two sets of features of the same rows, ready to be taken."""

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return its value with the rows of the second in an order, or as they are."""


Prepare = Callable[
    [Float[np.ndarray, "rows first_dim"], Float[np.ndarray, "rows second_dim"]], Measure
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
    measure: Measure, rows: int, *, permutations: int, seed: int
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
    error = float(np.std(values, ddof=1)) * _student_t(subsamples - 1)
    return value - error, value + error


def _student_t(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t, within 3 % from 4 degrees of freedom on.

    Reference:
        Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 26.7.5, two terms.
    """
    z = NormalDist().inv_cdf(0.5 + COVERED / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
