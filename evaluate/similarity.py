"""How alike two sets of features of the same rows are: CKA, SVCCA, mutual k-NN and CKNNA."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

from evaluate.nearest import Neighbours

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


def cka_of(moments: PairMoments, *, debiased: bool = False) -> float:
    """Return the linear CKA of two sets of features from sums over their pairs of rows.

    Args:
        moments: The sums.
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
        self._own = (
            self._hsic(self._first, self._first, (widths[0], widths[0])),
            self._hsic(self._second, self._second, (widths[1], widths[1])),
        )

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return the CKA of the first features with the second in an order, or as they are."""
        second = self._second if order is None else self._second[order]
        return ratio(self._hsic(self._first, second, self._widths), *self._own)

    def _hsic(
        self,
        first: Float32[np.ndarray, "rows first_dim"],
        second: Float32[np.ndarray, "rows second_dim"],
        widths: tuple[float, float],
    ) -> float:
        n = len(first)
        sums = np.zeros((2, n))
        trace = 0.0
        for rows, columns in _squares(n):
            kernels = [
                _kernel(side[rows], side[columns], width)
                for side, width in zip((first, second), widths, strict=True)
            ]
            sums[:, rows] += [kernel.sum(axis=1, dtype=np.float64) for kernel in kernels]
            trace += float((kernels[0] * kernels[1]).sum(dtype=np.float64))
        between, whole = float(sums[0] @ sums[1]), float(sums[0].sum() * sums[1].sum())
        return trace + whole / n**2 - 2 * between / n


def median_distance(features: Float[np.ndarray, "rows dim"]) -> float:
    """Return the median of the distances between rows (the first 2,048); 1 where it is 0."""
    from scipy.spatial.distance import pdist

    distances = pdist(features[:ROWS_FOR_MEDIAN].astype(np.float64))
    middle = (len(distances) - 1) // 2
    median = float(np.partition(distances, middle)[middle])
    return median if median > 0 else 1.0


def _squares(count: int) -> Iterator[tuple[slice, slice]]:
    parts = [slice(start, min(start + SIDE, count)) for start in range(0, count, SIDE)]
    return ((rows, columns) for rows in parts for columns in parts)


def _kernel(
    rows: Float32[np.ndarray, "rows dim"], columns: Float32[np.ndarray, "columns dim"], width: float
) -> Float32[np.ndarray, "rows columns"]:
    squares = np.square(rows).sum(axis=1)[:, None] + np.square(columns).sum(axis=1)
    squares -= 2 * rows @ columns.T
    np.maximum(squares, 0, out=squares)
    squares /= np.float32(-2 * width**2)
    kernel: np.ndarray = np.exp(squares, out=squares)
    return kernel


def _centred(features: Float[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
    """Move the origin to the mean: distances stay, and squares lose fewer digits."""
    rows = features.astype(np.float32)
    centred: np.ndarray = rows - rows.mean(axis=0)
    return centred


def svcca_of(moments: PairMoments, *, dims: int = 10) -> float:
    """Return the SVCCA of two sets of features from sums over their pairs of rows.

    Features are standardised, the `dims` first singular directions of each side are kept (fewer
    where a side has no more), and the canonical correlations between them are averaged.

    Reference:
        Raghu et al. 2017, SVCCA, arXiv:1706.05806; ten directions as Huh et al. 2024,
        arXiv:2405.07987. Exact, where their code takes a randomised decomposition.
    """
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


class MutualKnn:
    """Mutual k-NN, made ready to be taken with the rows of the second in other orders.

    Of each row, the share of its k nearest other rows (by cosine) in the first features that are
    among its k nearest in the second; then the mean over rows.

    Args:
        first: Neighbours in the first features, from `nearest_others` (or, of some rows only, from
            `nearest_among`; then there are no other orders of them).
        second: Neighbours of the same rows in the second, of the same k.

    Reference:
        Huh et al. 2024, The Platonic Representation Hypothesis, arXiv:2405.07987, appendix A.
    """

    def __init__(self, first: Neighbours, second: Neighbours) -> None:
        _check_same(first, second)
        self._first, self._second = first.rows, second.rows

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return the mean share, with the rows of the second in an order, or as they are."""
        return float(self.of_rows(order).mean())

    def of_rows(
        self, order: Int64[np.ndarray, "rows"] | None = None
    ) -> Float64[np.ndarray, "rows"]:
        """Return the share of each row."""
        second = self._second if order is None else reordered(self._second, order)
        shared, _ = shared_neighbours(self._first, second)
        shares: np.ndarray = shared.sum(axis=1) / self._first.shape[1]
        return shares


class Cknna:
    """CKNNA: CKA in which only the pairs of rows count that are neighbours in both features.

    The kernels are the cosines; the estimates of HSIC are the unbiased ones, over the kernel
    matrices with zeros wherever row j is not among the k nearest others of row i in both. Only
    these neighbours are held.

    Args:
        first: Neighbours in the first features, from `nearest_others`, k ≥ 2.
        second: Neighbours of the same rows in the second, of the same k.

    Reference:
        Huh et al. 2024, arXiv:2405.07987, appendix A, and the released `metrics.py`.
    """

    def __init__(self, first: Neighbours, second: Neighbours) -> None:
        _check_same(first, second)
        self._first, self._second = first, second
        self._own = [
            _sparse_hsic(each.rows, each.cosines, each.cosines) for each in (first, second)
        ]

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return CKNNA, with the rows of the second in an order, or as they are."""
        rows, cosines = self._second.rows, self._second.cosines
        if order is not None:
            rows, cosines = reordered(rows, order), cosines[order]
        shared, place = shared_neighbours(self._first.rows, rows)
        both = _sparse_hsic(
            self._first.rows,
            np.where(shared, self._first.cosines, 0),
            np.where(shared, np.take_along_axis(cosines, place, axis=1), 0),
        )
        return ratio(both, *self._own)


def reordered(
    neighbours: Int64[np.ndarray, "rows k"], order: Int64[np.ndarray, "rows"]
) -> Int64[np.ndarray, "rows k"]:
    """Return the neighbours that would be found if the rows came in another order."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    moved: np.ndarray = place[neighbours[order]]
    return moved


def shared_neighbours(
    first: Int64[np.ndarray, "rows k"], second: Int64[np.ndarray, "rows k"]
) -> tuple[Bool[np.ndarray, "rows k"], Int64[np.ndarray, "rows k"]]:
    """Tell which neighbours in the first are neighbours in the second too, and at which place."""
    start = (max(first.max(), second.max()) + 1) * np.arange(len(first))[:, None]
    ranks = np.argsort(second, axis=1)
    known = (np.take_along_axis(second, ranks, axis=1) + start).ravel()  # ascending all through
    wanted = (first + start).ravel()
    found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    shared = (known[found] == wanted).reshape(first.shape)
    place = np.where(shared, ranks.ravel()[found].reshape(first.shape), 0)
    return shared, place


def _sparse_hsic(
    columns: Int64[np.ndarray, "rows k"],
    first: Float[np.ndarray, "rows k"],
    second: Float[np.ndarray, "rows k"],
) -> float:
    """Return the unbiased HSIC of matrices that are zero but for k entries a row.

    The kernels are symmetric, but which entries are kept is not: in tr(KL) entry (i, j) meets entry
    (j, i), which counts only where it is kept as well.
    """
    n = len(columns)
    first, second = first.astype(np.float64), second.astype(np.float64)
    products = first * second
    kept = products != 0
    rows = np.broadcast_to(np.arange(n)[:, None], columns.shape)[kept]
    there, back = rows * n + columns[kept], columns[kept] * n + rows
    trace = float(products[kept][np.isin(back, there)].sum())
    column_sums = np.bincount(columns.ravel(), weights=first.ravel(), minlength=n)
    between = float(column_sums @ second.sum(axis=1))
    sums = float(first.sum() * second.sum())
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * between / (n - 2)) / (n * (n - 3))


def _check_same(first: Neighbours, second: Neighbours) -> None:
    if first.rows.shape != second.rows.shape:
        raise ValueError(
            f"There are neighbours of shape {first.rows.shape} and {second.rows.shape}. As many of "
            f"as many rows were expected on both sides. Take the same rows and k."
        )
