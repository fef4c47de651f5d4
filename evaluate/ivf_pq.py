"""Approximate nearest rows with FAISS, for references that an exact search takes too long for."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from evaluate.knn import Neighbours, nearest_neighbours, nearest_of, normalised_blocks, unit_rows
from features.errors import EvaluationError

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
