"""SVCCA: how well the main directions of two sets of features predict one another."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Float64, Int64

from evaluate.moments import CrossMoments, Pair, PairMoments


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
