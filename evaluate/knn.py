"""k-NN classification: the nearest reference rows vote for a class."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64

from evaluate.flat_search import flat_search

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
    """Find the k nearest rows by cosine, exactly (`evaluate.flat_search` says with what).

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
