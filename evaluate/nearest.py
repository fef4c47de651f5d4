"""Mutual k-NN and CKNNA: whether two sets of features call the same rows neighbours."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import isqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64

from evaluate.similarity import ratio
from features.errors import EvaluationError

COSINES_AT_ONCE = 1 << 26
"""In torch, where a matrix of queries × rows is made: 256 MiB."""
MOST_ON_GPU = 2048
"""FAISS finds no more neighbours than these on a GPU."""
Queries = Float32[np.ndarray, "queries dim"]
Block = Float32[np.ndarray, "rows dim"]
Found = tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]
"""Inner products and positions in the block, the greatest first."""


@dataclass(frozen=True)
class FlatSearch:
    """A way to compare every query with every row; all of them find the same neighbours."""

    name: str
    """What searches, where, and why no faster way is taken."""
    search: Callable[[Queries, Block, int], Found]
    """From queries, a block and k (at most the rows of the block) to the k rows nearest."""


@cache
def flat_search() -> FlatSearch:
    """Return the fastest way that this machine has."""
    try:
        import faiss  # heavy, and not needed by the other measures
    except ImportError as error:
        return FlatSearch(f"torch {torch.__version__}: no FAISS ({error})", _of_torch)
    on_processor = partial(_on_processor, faiss)
    name = f"FAISS {faiss.__version__}"
    if not hasattr(faiss, "StandardGpuResources"):
        return FlatSearch(f"{name} on the CPU: built without GPU", on_processor)
    if not faiss.get_num_gpus():
        return FlatSearch(f"{name} on the CPU: no GPU", on_processor)
    on_gpu = partial(_on_gpu, faiss, faiss.StandardGpuResources())
    return FlatSearch(f"{name} on the GPU", on_gpu)


def _on_processor(faiss: Any, queries: Queries, block: Block, k: int) -> Found:
    found: Found = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return found


def _on_gpu(faiss: Any, resources: Any, queries: Queries, block: Block, k: int) -> Found:
    if k > MOST_ON_GPU:
        return _on_processor(faiss, queries, block, k)
    metric = faiss.METRIC_INNER_PRODUCT
    found: Found = faiss.knn_gpu(resources, queries, block, k, metric=metric)
    return found


def _of_torch(queries: Queries, block: Block, k: int) -> Found:
    rows = torch.from_numpy(block)
    step = max(1, COSINES_AT_ONCE // len(block))
    parts = [
        torch.topk(torch.from_numpy(queries[start : start + step]) @ rows.T, k, dim=1)
        for start in range(0, len(queries), step)
    ]
    cosines, places = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return cosines, places


VOTES_AT_ONCE = 1 << 23
BLOCK_BYTES = 1 << 26
"""Of the reference that is searched at once: new pages for every block would cost more time than
reading it."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest reference rows of every query, nearest first."""

    cosines: Float32[np.ndarray, "queries k"]
    rows: Int64[np.ndarray, "queries k"]
    """Position in the reference."""


def nearest_neighbours(
    queries: Float[np.ndarray, "queries dim"],
    reference: Iterable[Float[np.ndarray, "_ dim"]],
    k: int,
) -> Neighbours:
    """Find the k nearest rows by cosine, exactly (`evaluate.nearest` says with what).

    The reference comes in blocks, of which a few are held at a time, so its size does not matter.
    Among equally near rows the first one in the reference is taken, within what the search returns
    of a block.

    Args:
        queries: Vectors of any length; normalised here.
        reference: Blocks of rows, in order; normalised here.
        k: Neighbours of each query; fewer come back when the reference has fewer.
    """
    queries = unit_rows(queries)
    none = np.empty((len(queries), 0))
    nearest = Neighbours(none.astype(np.float32), none.astype(np.int64))
    start = 0
    for block in normalised_blocks(reference, queries.shape[1]):
        if len(queries):
            found, where = flat_search().search(queries, block, min(k, len(block)))
            cosines = np.concatenate([nearest.cosines, found], axis=1)
            nearest = nearest_of(cosines, np.concatenate([nearest.rows, where + start], axis=1), k)
        start += len(block)
    return nearest


def vote(
    neighbours: Neighbours,
    labels: Int64[np.ndarray, "rows"],
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> Int64[np.ndarray, "queries"]:
    """Return the class with most votes, each neighbour's weighing exp(cosine / temperature).

    Of classes with equal votes the one with the lowest number wins.

    Args:
        neighbours: At least k of each query.
        labels: The class of each reference row.
        k: Neighbours that vote.
        temperature: T; the smaller, the more the nearest decide.
        num_classes: Classes in all.

    Reference:
        Caron et al. 2021, DINO, arXiv:2104.14294, appendix F.1, and the released `eval_knn.py`,
        after Wu et al. 2018, arXiv:1805.01978.
    """
    cosines = neighbours.cosines[:, :k].astype(np.float64)
    weights = np.exp((cosines - cosines.max(axis=1, keepdims=True, initial=-1.0)) / temperature)
    classes = labels[neighbours.rows[:, :k]]
    predicted = np.empty(len(cosines), dtype=np.int64)
    step = max(1, VOTES_AT_ONCE // num_classes)
    for start in range(0, len(cosines), step):
        part = slice(start, start + step)
        queries = len(classes[part])
        place = classes[part] + num_classes * np.arange(queries)[:, None]
        votes = np.bincount(
            place.ravel(), weights=weights[part].ravel(), minlength=queries * num_classes
        )
        predicted[part] = votes.reshape(queries, num_classes).argmax(axis=1)
    return predicted


def nearest_of(
    cosines: Float32[np.ndarray, "queries candidates"],
    rows: Int64[np.ndarray, "queries candidates"],
    k: int,
) -> Neighbours:
    """Return the k nearest of some candidates; of equally near ones the first row comes first."""
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1))


def normalised_blocks(
    blocks: Iterable[Float[np.ndarray, "_ dim"]], dim: int
) -> Iterator[Float32[np.ndarray, "_ dim"]]:
    """Yield the rows of the blocks normalised, many at once, in memory that is used again."""
    buffer = np.empty((max(1, BLOCK_BYTES // (4 * dim)), dim), dtype=np.float32)
    filled = 0
    for block in blocks:
        start = 0
        while start < len(block):
            part = block[start : start + len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            filled, start = filled + len(part), start + len(part)
            if filled == len(buffer):
                yield _normalise(buffer)
                filled = 0
    if filled:
        yield _normalise(buffer[:filled])


def unit_rows(features: Float[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
    """Return a copy of rows with the length 1."""
    return _normalise(np.array(features, dtype=np.float32, order="C"))


def _normalise(rows: Float32[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
    """Give rows the length 1, in their place."""
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))  # unlike linalg.norm, without a copy
    rows /= np.maximum(norms, 1e-12)[:, None]
    return rows


logger = logging.getLogger(__name__)
LEAST_ROWS = 10_000
"""Codes of 256 values cannot be learned from many fewer."""
TRAINED_ON = 64  # rows for each list
PROBED = 16  # every so many of the lists is looked into, those nearest to the query
CANDIDATES = 4  # for each neighbour; their cosines are then computed
NUMBERS_PER_BYTE = 4
RECALL_QUERIES = 256
COMPARED_BYTES = 1 << 26


@dataclass(frozen=True)
class Approximation:
    """Neighbours of which some may be missed; the cosines of those that are there are exact."""

    neighbours: Neighbours
    """Row −1 with the cosine −∞ where fewer were found."""
    recall: float
    """Share of the exact k nearest that are there, of some of the queries."""
    recall_queries: int
    about: str
    """The index, and how it was searched."""


def approximate_neighbours(
    queries: Float[np.ndarray, "queries dim"],
    reference: Callable[[], Iterable[Float[np.ndarray, "_ dim"]]],
    rows: int,
    k: int,
    *,
    seed: int,
) -> Approximation:
    """Find most of the k nearest rows by cosine with an inverted file of product codes.

    The reference is read four times: to learn the lists and codes from some rows, to encode all
    (a byte for four numbers, which is held), to compare the candidates of every query exactly,
    and for the exact neighbours of a sample of the queries.

    Args:
        queries: Vectors of any length.
        reference: Reads the blocks of rows anew, in order.
        rows: Of the reference, at least `LEAST_ROWS`.
        k: Neighbours of each query.
        seed: Of the rows that are learned from, and of the sample.

    Raises:
        EvaluationError: FAISS cannot be imported.

    Reference:
        Jégou et al. 2011, Product Quantization for Nearest Neighbor Search, section IV.
    """
    generator = np.random.default_rng(seed)
    queries = unit_rows(queries)
    index, about = _built(reference, rows, queries.shape[1], generator)
    _, found = index.search(queries, min(CANDIDATES * k, rows))
    neighbours = _compared(queries, found, reference, k)
    asked = min(RECALL_QUERIES, len(queries))
    sample = generator.choice(len(queries), asked, replace=False)
    exact = nearest_neighbours(queries[sample], reference(), k).rows
    shared = [
        len(np.intersect1d(*each)) for each in zip(exact, neighbours.rows[sample], strict=True)
    ]
    recall = float(np.sum(shared)) / exact.size
    return Approximation(neighbours, recall, asked, f"{about}, {found.shape[1]} candidates")


def _built(
    reference: Callable[[], Iterable[Float[np.ndarray, "_ dim"]]],
    rows: int,
    dim: int,
    generator: np.random.Generator,
) -> tuple[Any, str]:
    """Return the index of a reference, and what it is."""
    try:
        import faiss  # heavy, and not needed by the other measures
    except ImportError as error:
        raise EvaluationError(
            f"eval.knn_search is 'ivf-pq', but FAISS cannot be imported ({error}). FAISS was "
            f"expected for it. Install faiss-cpu, or set eval.knn_search = 'exact'."
        ) from error
    lists = isqrt(rows)
    codes = max(size for size in range(1, max(2, dim // NUMBERS_PER_BYTE + 1)) if dim % size == 0)
    about = f"IVF{lists},PQ{codes}"
    index: Any = faiss.index_factory(dim, about, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(1, lists // PROBED)
    number = min(rows, max(TRAINED_ON * lists, LEAST_ROWS))
    chosen = np.sort(generator.choice(rows, number, replace=False))
    logger.info("learning %s from %d of %d rows", about, len(chosen), rows)
    index.train(_rows_of(reference(), chosen, dim))
    for block in normalised_blocks(reference(), dim):
        index.add(block)
    return index, f"{about}, {index.nprobe} lists"


def _rows_of(
    reference: Iterable[Float[np.ndarray, "_ dim"]], chosen: Int64[np.ndarray, "chosen"], dim: int
) -> Float32[np.ndarray, "chosen dim"]:
    """Return some rows of a reference, which must be in order."""
    parts, start = [], 0
    for block in normalised_blocks(reference, dim):
        first, last = np.searchsorted(chosen, [start, start + len(block)])
        parts.append(block[chosen[first:last] - start])
        start += len(block)
    return np.concatenate(parts)


def _compared(
    queries: Float32[np.ndarray, "queries dim"],
    found: Int64[np.ndarray, "queries candidates"],
    reference: Callable[[], Iterable[Float[np.ndarray, "_ dim"]]],
    k: int,
) -> Neighbours:
    """Return the k nearest of the candidates of every query by their exact cosines."""
    cosines = np.full(found.size, -np.inf, dtype=np.float32)
    order = np.argsort(found, axis=None, kind="stable")
    ordered = found.ravel()[order]
    step = max(1, COMPARED_BYTES // queries[:1].nbytes)
    start = 0
    for block in normalised_blocks(reference(), queries.shape[1]):
        first, last = np.searchsorted(ordered, [start, start + len(block)])
        for at in range(first, last, step):
            pairs = order[at : min(at + step, last)]
            asking, answering = (
                queries[pairs // found.shape[1]],
                block[found.ravel()[pairs] - start],
            )
            cosines[pairs] = np.einsum("ij,ij->i", asking, answering)
        start += len(block)
    return nearest_of(cosines.reshape(found.shape), found, k)


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
