"""SVCCA: how well the main directions of two sets of features predict one another."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

Pair = tuple[Float[np.ndarray, "_ first_dim"], Float[np.ndarray, "_ second_dim"]]
"""The same rows of two sets of features."""


@dataclass
class CrossMoments:
    """What HSIC with linear kernels needs of rows a and b: memory dim², whatever the rows.

    With K = AAᵀ and L = BBᵀ every sum over the rows × rows entries of K and L is one over these.
    """

    rows: int
    first_sum: Float64[np.ndarray, "first_dim"]
    second_sum: Float64[np.ndarray, "second_dim"]
    product: Float64[np.ndarray, "first_dim second_dim"]
    """AᵀB."""
    first_trace: float
    """Σ ‖a‖²."""
    second_trace: float
    diagonals: float
    """Σ ‖a‖²‖b‖²."""
    first_by_diagonal: Float64[np.ndarray, "first_dim"]
    """Σ a ‖b‖²."""
    second_by_diagonal: Float64[np.ndarray, "second_dim"]
    """Σ b ‖a‖²."""

    @classmethod
    def of(
        cls, first: Float64[np.ndarray, "rows first_dim"], second: Float64[np.ndarray, "rows dim"]
    ) -> "CrossMoments":
        """Sum over the rows of one block."""
        first_norms, second_norms = np.square(first).sum(axis=1), np.square(second).sum(axis=1)
        return cls(
            rows=len(first),
            first_sum=first.sum(axis=0),
            second_sum=second.sum(axis=0),
            product=first.T @ second,
            first_trace=float(first_norms.sum()),
            second_trace=float(second_norms.sum()),
            diagonals=float(first_norms @ second_norms),
            first_by_diagonal=second_norms @ first,
            second_by_diagonal=first_norms @ second,
        )

    def add(self, other: "CrossMoments") -> None:
        """Add the sums of further rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def centred_product(self) -> Float64[np.ndarray, "first_dim second_dim"]:
        """AᵀB after the means are taken from A and B."""
        centred: np.ndarray = self.product - np.outer(self.first_sum, self.second_sum) / self.rows
        return centred

    def hsic(self) -> float:
        """Return tr(KHLH), the biased HSIC times (rows − 1)², H taking out the mean.

        Reference:
            Gretton et al. 2005, Measuring Statistical Dependence with Hilbert–Schmidt Norms, eq. 9.
        """
        return float(np.square(self.centred_product).sum())

    def debiased_hsic(self) -> float:
        """Return the unbiased estimate of HSIC, which is 0 on average for independent rows.

        Reference:
            Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, eq. 5.
        """
        n = self.rows
        # K̃ and L̃ are K and L with a diagonal of zeros.
        trace = np.square(self.product).sum() - self.diagonals
        first = self.first_sum @ self.first_sum - self.first_trace
        second = self.second_sum @ self.second_sum - self.second_trace
        between = (
            self.first_sum @ self.product @ self.second_sum
            - self.first_sum @ self.first_by_diagonal
            - self.second_sum @ self.second_by_diagonal
            + self.diagonals
        )
        total = trace + first * second / ((n - 1) * (n - 2)) - 2 * between / (n - 2)
        return float(total / (n * (n - 3)))


@dataclass
class PairMoments:
    """The sums of each side with itself, and of the two."""

    first: CrossMoments
    second: CrossMoments
    both: CrossMoments

    @classmethod
    def over(cls, pairs: Iterable[Pair]) -> "PairMoments":
        """Sum over blocks of pairs of rows, of which one block is held at a time, in float64.

        The mean of the first block is taken from all rows: no measure here depends on where the
        origin is, and sums far from it would lose digits.

        Args:
            pairs: Blocks of the first and the second features; row i of one belongs to row i of
                the other.

        Raises:
            ValueError: There is no row, or a block has not as many rows on both sides.
        """
        total: PairMoments | None = None
        origins: tuple[np.ndarray, np.ndarray] | None = None
        for first, second in pairs:
            _check_rows(first, second)
            if not len(first):
                continue
            first, second = first.astype(np.float64), second.astype(np.float64)
            origins = origins or (first.mean(axis=0), second.mean(axis=0))
            block = cls.of(first - origins[0], second - origins[1])
            if total is None:
                total = block
            else:
                total.add(block)
        if total is None:
            raise ValueError("There are no pairs of rows. At least one block of them was expected.")
        return total

    @classmethod
    def of(
        cls, first: Float64[np.ndarray, "rows first_dim"], second: Float64[np.ndarray, "rows dim"]
    ) -> "PairMoments":
        """Sum over one block, as it is."""
        return cls(
            CrossMoments.of(first, first),
            CrossMoments.of(second, second),
            CrossMoments.of(first, second),
        )

    def add(self, other: "PairMoments") -> None:
        """Add the sums of further rows."""
        self.first.add(other.first)
        self.second.add(other.second)
        self.both.add(other.both)


def _check_rows(first: np.ndarray, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"A block has {len(first)} rows on the first side and {len(second)} on the second. As "
            f"many on both were expected. Take the same rows of both."
        )


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


SIDE = 2048
"""Rows and columns of a block: 16 MiB of float32 each, of which some few are held."""
ROWS_FOR_MEDIAN = 2048


class RbfCka:
    """RBF CKA of arrays, made ready to be taken with the rows of the second in other orders.

    The kernel of x and y is exp(−‖x − y‖² / 2σ²). The time grows with the square of the rows, the
    memory only with the rows: no matrix of rows × rows is ever whole.

    Args:
        first: Features.
        second: Features of the same rows.
        debiased: Take the unbiased estimates of HSIC.
        bandwidths: σ of either side; the median distance between rows if not given (of the first
            2,048 rows, so shuffle rows that are sorted).

    Raises:
        ValueError: There are fewer than four rows.

    Reference:
        Kornblith et al. 2019, arXiv:1905.00414, section 4.2 (σ as a share of the median distance).
    """

    def __init__(
        self,
        first: Float[np.ndarray, "rows first_dim"],
        second: Float[np.ndarray, "rows second_dim"],
        *,
        debiased: bool = False,
        bandwidths: tuple[float, float] | None = None,
    ) -> None:
        if len(first) < LEAST_ROWS or len(first) != len(second):
            raise ValueError(
                f"RBF CKA of {len(first)} and {len(second)} rows cannot be taken. As many of both, "
                f"and at least {LEAST_ROWS}, were expected. Give other rows."
            )
        self._first, self._second = _centred(first), _centred(second)
        widths = bandwidths or (median_distance(first), median_distance(second))
        self._widths = widths
        self._debiased = debiased
        self._own = (
            self._hsic(self._first, self._first, (widths[0], widths[0])),
            self._hsic(self._second, self._second, (widths[1], widths[1])),
        )

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return the CKA of the first features with the second in an order, or as they are."""
        second = self._second if order is None else self._second[torch.from_numpy(order)]
        return ratio(self._hsic(self._first, second, self._widths), *self._own)

    def _hsic(
        self,
        first: Float32[Tensor, "rows first_dim"],
        second: Float32[Tensor, "rows second_dim"],
        widths: tuple[float, float],
    ) -> float:
        n = len(first)
        first_rows = torch.zeros(n, dtype=torch.float64)
        second_rows = torch.zeros(n, dtype=torch.float64)
        trace = 0.0
        for rows, columns in _blocks(n):
            kernels = [
                _kernel(side[rows], side[columns], width)
                for side, width in zip((first, second), widths, strict=True)
            ]
            if self._debiased and rows == columns:
                for kernel in kernels:
                    kernel.fill_diagonal_(0)
            first_rows[rows] += kernels[0].sum(dim=1, dtype=torch.float64)
            second_rows[rows] += kernels[1].sum(dim=1, dtype=torch.float64)
            trace += float((kernels[0] * kernels[1]).sum(dtype=torch.float64))
        between = float(first_rows @ second_rows)
        sums = float(first_rows.sum() * second_rows.sum())
        if self._debiased:
            total = trace + sums / ((n - 1) * (n - 2)) - 2 * between / (n - 2)
            return total / (n * (n - 3))
        return trace + sums / n**2 - 2 * between / n


def median_distance(features: Float[np.ndarray, "rows dim"]) -> float:
    """Return the median of the distances between rows (the first 2,048); 1 where it is 0."""
    median = float(torch.pdist(_centred(features[:ROWS_FOR_MEDIAN])).median())
    return median if median > 0 else 1.0


def _blocks(rows: int) -> Iterator[tuple[slice, slice]]:
    parts = [slice(start, min(start + SIDE, rows)) for start in range(0, rows, SIDE)]
    for part in parts:
        for other in parts:
            yield part, other


def _kernel(
    rows: Float32[Tensor, "rows dim"], columns: Float32[Tensor, "columns dim"], width: float
) -> Float32[Tensor, "rows columns"]:
    squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return squares.addmm_(rows, columns.T, alpha=-2).clamp_(min=0).div_(-2 * width**2).exp_()


def _centred(features: Float[np.ndarray, "rows dim"]) -> Float32[Tensor, "rows dim"]:
    """Move the origin to the mean: distances stay, and squares lose fewer digits."""
    rows = features.astype(np.float32)
    return torch.from_numpy(rows - rows.mean(axis=0))


def svcca(pairs: Iterable[Pair], *, dims: int = 10) -> float:
    """Return SVCCA in one pass over blocks of rows.

    Features are standardised, the `dims` first singular directions of each side are kept, and the
    canonical correlations between them are averaged.

    Args:
        pairs: Blocks of rows of both; see `PairMoments.over`.
        dims: Directions kept; fewer where a side has no more.

    Reference:
        Raghu et al. 2017, SVCCA, arXiv:1706.05806; ten directions as Huh et al. 2024,
        arXiv:2405.07987. Exact, where their code takes a randomised decomposition.
    """
    return svcca_of(PairMoments.over(pairs), dims=dims)


def svcca_of(moments: PairMoments, *, dims: int = 10) -> float:
    """Return the SVCCA that follows from sums over pairs of rows; see `svcca`."""
    first = _whitening(moments.first, dims)
    second = _whitening(moments.second, dims)
    return _mean_correlation(first.T @ moments.both.centred_product @ second)


def mean_shuffled_svcca(rows: int, *, dims: int = 10, draws: int = 200, seed: int = 0) -> float:
    """Return the mean SVCCA of so many rows whose pairs are shuffled, without shuffling them.

    Over all orders of the rows of the second the products of two orthonormal directions have the
    mean 0 and the variance 1 / (rows − 1), and thousands of rows make them normal.

    Reference:
        Hoeffding 1951, A Combinatorial Central Limit Theorem, Annals of Mathematical Statistics 22.
    """
    between = np.random.default_rng(seed).standard_normal((draws, dims, dims)) / np.sqrt(rows - 1)
    return float(np.linalg.svd(between, compute_uv=False).mean())


class Svcca:
    """SVCCA of arrays, made ready to be taken with the rows of the second in other orders."""

    def __init__(
        self,
        first: Float[np.ndarray, "rows first_dim"],
        second: Float[np.ndarray, "rows second_dim"],
        *,
        dims: int = 10,
    ) -> None:
        self._first, self._second = _directions(first, dims), _directions(second, dims)

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return SVCCA of the first features with the second in an order, or as they are."""
        second = self._second if order is None else self._second[order]
        return _mean_correlation(self._first.T @ second)


def _directions(
    features: Float[np.ndarray, "rows dim"], dims: int
) -> Float64[np.ndarray, "rows kept"]:
    """Return the first singular directions, orthonormal over the rows.

    Of fewer rows than dimensions from the products of rows with rows, which are then the fewer.
    """
    rows = features.astype(np.float64)
    rows -= rows.mean(axis=0)
    if len(rows) < rows.shape[1]:
        rows /= _scale(np.square(rows).sum(axis=0))
        return _leading(rows @ rows.T, dims)[1]
    directions: np.ndarray = rows @ _whitening(CrossMoments.of(rows, rows), dims)
    return directions


def _whitening(moments: CrossMoments, dims: int) -> Float64[np.ndarray, "dim kept"]:
    """Return the matrix that makes centred rows into their first singular directions."""
    product = moments.centred_product
    scale = _scale(np.diag(product))
    values, vectors = _leading(product / np.outer(scale, scale), dims)
    whitening: np.ndarray = vectors / scale[:, None] / np.sqrt(values)
    return whitening


def _scale(squares: Float64[np.ndarray, "dim"]) -> Float64[np.ndarray, "dim"]:
    """Return what standardises features, given the sums of their squares about the mean."""
    scale = np.sqrt(np.maximum(squares, 0))
    varies = scale > 1e-12 * scale.max(initial=0.0)
    standard: np.ndarray = np.where(varies, scale, np.inf)  # one that does not vary says nothing
    return standard


def _leading(
    product: Float64[np.ndarray, "side side"], dims: int
) -> tuple[Float64[np.ndarray, "kept"], Float64[np.ndarray, "side kept"]]:
    """Return the greatest eigenvalues that are not 0, and their vectors."""
    values, vectors = np.linalg.eigh(product)
    values, vectors = values[::-1][:dims], vectors[:, ::-1][:, :dims]
    kept = values > 1e-10 * max(values.max(initial=0.0), 1e-300)
    return values[kept], vectors[:, kept]


def _mean_correlation(between: Float64[np.ndarray, "first second"]) -> float:
    if not min(between.shape):
        return 0.0
    return float(np.clip(np.linalg.svd(between, compute_uv=False), 0, 1).mean())
