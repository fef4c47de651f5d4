"""CKA with linear kernels: how alike two sets of features of the same rows are, 0 to 1.

Computed from products of features (dim × dim) in one pass, so that rows cost no memory.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Float64, Int64

from evaluate.moments import CrossMoments, Pair, PairMoments

LEAST_ROWS = 4
"""The unbiased HSIC divides by rows − 3."""


def linear_cka(pairs: Iterable[Pair], *, debiased: bool = False) -> float:
    """Return the linear CKA of two sets of features, in one pass over blocks of rows.

    Args:
        pairs: Blocks of rows of both; see `PairMoments.over`.
        debiased: Take unbiased estimates of HSIC. Without, few rows and many dimensions give high
            values even to features that have nothing to do with one another; with, those give 0
            on average (and values below 0 occur).

    Returns:
        The value; 0 where the features of a side are all the same.

    Raises:
        ValueError: There are fewer than four rows.

    Reference:
        Kornblith et al. 2019, Similarity of Neural Network Representations Revisited,
        arXiv:1905.00414; debiased: Murphy et al. 2024, arXiv:2405.01012, with the HSIC of Song et
        al. 2012.
    """
    return cka_of(PairMoments.over(pairs), debiased=debiased)


def cka_of(moments: PairMoments, *, debiased: bool = False) -> float:
    """Return the linear CKA that follows from sums over pairs of rows; see `linear_cka`."""
    _check_number(moments.both.rows)
    return ratio(*(_hsic(each, debiased) for each in (moments.both, moments.first, moments.second)))


def mean_shuffled_cka(moments: PairMoments, *, debiased: bool = False) -> float:
    """Return the mean linear CKA over all orders of the rows of the second, without shuffling.

    With the centred kernels K and L, tr(K P L Pᵀ) is on average tr(K) tr(L) / (rows − 1) over all
    permutations P; the unbiased HSIC is 0.

    Reference:
        Kazi-Aoual et al. 1995, Refined approximations to permutation tests for multivariate
        inference, Computational Statistics & Data Analysis 20.
    """
    if debiased:
        return 0.0
    first, second = moments.first, moments.second
    between = np.trace(first.centred_product) * np.trace(second.centred_product)
    return ratio(float(between) / (moments.both.rows - 1), first.hsic(), second.hsic())


def minibatch_cka(batches: Iterable[Pair]) -> float:
    """Return the minibatch CKA: unbiased HSIC averaged over batches, then the ratio.

    It does not depend on the size of the batches, on average; `linear_cka(debiased=True)` has less
    variance at the same cost, since it also compares rows of different batches.

    Args:
        batches: Pairs of at least four rows each.

    Raises:
        ValueError: There is no batch, or one has fewer than four rows.

    Reference:
        Nguyen, Raghu, Kornblith 2021, Do Wide and Deep Networks Learn the Same Things?,
        arXiv:2010.15327, eq. 2 to 4.
    """
    estimates = []
    for batch in batches:
        moments = PairMoments.over([batch])
        _check_number(moments.both.rows)
        estimates.append(
            [each.debiased_hsic() for each in (moments.both, moments.first, moments.second)]
        )
    if not estimates:
        raise ValueError("There are no batches. At least one of four rows was expected.")
    return ratio(*np.mean(estimates, axis=0).tolist())


class LinearCka:
    """Linear CKA of arrays, made ready to be taken with the rows of the second in other orders."""

    def __init__(
        self,
        first: Float[np.ndarray, "rows first_dim"],
        second: Float[np.ndarray, "rows second_dim"],
        *,
        debiased: bool = False,
    ) -> None:
        _check_number(len(first))
        self._first, self._second = _compact(first), _compact(second)
        self._debiased = debiased
        self._own = [
            _hsic(CrossMoments.of(side, side), debiased) for side in (self._first, self._second)
        ]

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return the CKA of the first features with the second in an order, or as they are."""
        second = self._second if order is None else self._second[order]
        return ratio(_hsic(CrossMoments.of(self._first, second), self._debiased), *self._own)


def ratio(both: float, first: float, second: float) -> float:
    """Return CKA from the HSIC of both sides and of each with itself; 0 where one of these is 0."""
    product = max(first, 0.0) * max(second, 0.0)
    return float(both / np.sqrt(product)) if product > 0 else 0.0


def _hsic(moments: CrossMoments, debiased: bool) -> float:
    return moments.debiased_hsic() if debiased else moments.hsic()


def _compact(features: Float[np.ndarray, "rows dim"]) -> Float64[np.ndarray, "rows fewer"]:
    """Centre features, and turn them so that they have no more dimensions than rows.

    Linear kernels are products of rows, which no rotation changes.
    """
    centred: np.ndarray = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    if len(centred) < centred.shape[1]:
        centred = np.linalg.qr(centred.T, mode="r").T  # type: ignore[attr-defined]  # wrong stub
    return centred


def _check_number(rows: int) -> None:
    if rows < LEAST_ROWS:
        raise ValueError(
            f"CKA of {rows} rows cannot be taken. At least {LEAST_ROWS} were expected. Give more."
        )
