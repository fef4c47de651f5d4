"""Mutual k-NN and CKNNA: whether two sets of features call the same rows neighbours."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from evaluate.cka import ratio
from evaluate.knn import Neighbours, nearest_neighbours

QUERIES_AT_ONCE = 4096
ROWS_AT_ONCE = 65_536


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


def nearest_others(features: Float[np.ndarray, "rows dim"], k: int) -> Neighbours:
    """Find the k nearest other rows of every row, by cosine, exactly.

    Blocks of rows are compared with blocks of rows; beside the features themselves, which may be
    a memory map of any dtype, only the k neighbours of each row are held.

    Raises:
        ValueError: There are no k other rows.
    """
    if not 1 <= k < len(features):
        raise ValueError(
            f"{k} neighbours of {len(features)} rows cannot be found. A k from 1 to "
            f"{len(features) - 1} was expected. Take a smaller k, or more rows."
        )
    cosines = np.empty((len(features), k), dtype=np.float32)
    rows = np.empty((len(features), k), dtype=np.int64)
    for start in range(0, len(features), QUERIES_AT_ONCE):
        queries = features[start : start + QUERIES_AT_ONCE]
        numbers = np.arange(start, start + len(queries))
        part = nearest_among(queries, numbers, _blocks_of(features), k)
        cosines[numbers], rows[numbers] = part.cosines, part.rows
    return Neighbours(cosines, rows)


def nearest_among(
    queries: Float[np.ndarray, "queries dim"],
    numbers: Int64[np.ndarray, "queries"],
    blocks: Iterable[Float[np.ndarray, "_ dim"]],
    k: int,
) -> Neighbours:
    """Find the k nearest other rows of some rows among all, by cosine, exactly.

    Args:
        queries: Features of these rows.
        numbers: Their positions among all.
        blocks: All rows in order, these among them; more than k.
        k: Neighbours of each.
    """
    found = nearest_neighbours(queries, blocks, k + 1)
    is_self = found.rows == numbers[:, None]
    is_self[:, -1] |= ~is_self.any(axis=1)  # where k + 1 copies of the row stand before it
    shape = (len(numbers), k)
    return Neighbours(found.cosines[~is_self].reshape(shape), found.rows[~is_self].reshape(shape))


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


def _blocks_of(features: Float[np.ndarray, "rows dim"]) -> Iterator[Float[np.ndarray, "_ dim"]]:
    for start in range(0, len(features), ROWS_AT_ONCE):
        yield features[start : start + ROWS_AT_ONCE]


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
