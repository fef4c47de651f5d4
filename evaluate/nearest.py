"""The nearest rows by cosine: one exact search, block by block, and one index for many rows.

Every search of the program goes through here: k-NN classification, the alignment measures, `sail
search`, `sail explore` and its near-duplicates.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import isqrt
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Float16, Float32, Int64

from features.errors import EvaluationError
from features.storage.files import appearing
from features.storage.reading import is_sealed, seal

logger = logging.getLogger(__name__)
Reference = Callable[[], Iterable[Float[np.ndarray, "_ dim"]]]
"""Reads the blocks of all rows anew, in order."""

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


def flat_search() -> FlatSearch:
    """Return the fastest way that this machine has, on the device that the run has chosen."""
    try:
        import faiss  # heavy, and not needed by the other measures
    except ImportError as error:
        import torch

        return FlatSearch(f"torch {torch.__version__}: no FAISS ({error})", _of_torch)
    on_processor = partial(_on_processor, faiss)
    name = f"FAISS {faiss.__version__}"
    from features.device.cuda import chosen, is_gpu  # torch is heavy too

    device = chosen()
    if not hasattr(faiss, "StandardGpuResources"):
        why = "built without GPU"
    elif not faiss.get_num_gpus():
        why = "no GPU"
    elif device is not None and not is_gpu(device):
        why = f"run.device is {device}"
    else:
        number = (device.index if device is not None else None) or 0
        on_gpu = partial(_on_gpu, faiss, _gpu_resources(), number)
        return FlatSearch(f"{name} on the GPU", on_gpu)
    return FlatSearch(f"{name} on the CPU: {why}", on_processor)


@cache
def _gpu_resources() -> Any:
    import faiss

    return faiss.StandardGpuResources()


def _on_processor(faiss: Any, queries: Queries, block: Block, k: int) -> Found:
    found: Found = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return found


def _on_gpu(
    faiss: Any, resources: Any, number: int, queries: Queries, block: Block, k: int
) -> Found:
    if k > MOST_ON_GPU:
        return _on_processor(faiss, queries, block, k)
    metric = faiss.METRIC_INNER_PRODUCT
    found: Found = faiss.knn_gpu(resources, queries, block, k, metric=metric, device=number)
    return found


def _of_torch(queries: Queries, block: Block, k: int) -> Found:
    import torch  # as FAISS

    rows = torch.from_numpy(block)
    step = max(1, COSINES_AT_ONCE // len(block))
    parts = [
        torch.topk(torch.from_numpy(queries[start : start + step]) @ rows.T, k, dim=1)
        for start in range(0, len(queries), step)
    ]
    cosines, places = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return cosines, places


VOTES_AT_ONCE = 1 << 23
QUERIES_AT_ONCE, ROWS_AT_ONCE = 4096, 65_536
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


def nearest_by_score(
    query: Float32[np.ndarray, "1 dim"],
    reference: Iterable[Float[np.ndarray, "_ dim"]],
    offsets: Float[np.ndarray, "rows"],
    k: int,
) -> Neighbours:
    """Find the k rows whose cosine with a vector, less a number of the row, is greatest, exactly.

    Takes and returns what `nearest_neighbours` does, of one query; the cosines are those of the
    rows that were found, without the numbers taken off.
    """
    query = unit_rows(query)
    best = Neighbours(np.empty((1, 0), dtype=np.float32), np.empty((1, 0), dtype=np.int64))
    start = 0
    for block in normalised_blocks(reference, query.shape[1]):
        rows = np.arange(start, start + len(block))
        scores = np.concatenate([best.cosines, query @ block.T - offsets[rows]], axis=1)
        best = nearest_of(scores, np.concatenate([best.rows, rows[None]], axis=1), k)
        start += len(block)
    return Neighbours(best.cosines + offsets[best.rows], best.rows)


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
        part = nearest_among(queries, numbers, blocks_of(features), k)
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


def blocks_of(features: Float[np.ndarray, "rows dim"]) -> Iterator[Float[np.ndarray, "_ dim"]]:
    """Yield rows that are held, or mapped from a file, some at a time."""
    for start in range(0, len(features), ROWS_AT_ONCE):
        yield features[start : start + ROWS_AT_ONCE]


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
    reference: Reference,
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
    queries, lists, dim = unit_rows(queries), isqrt(rows), queries.shape[1]
    codes = max(size for size in range(1, max(2, dim // NUMBERS_PER_BYTE + 1)) if dim % size == 0)
    name = f"IVF{lists},PQ{codes}"
    index = _built(reference, (rows, dim), name, max(TRAINED_ON * lists, LEAST_ROWS), generator)
    index.nprobe = max(1, lists // PROBED)
    _, found = index.search(queries, min(CANDIDATES * k, rows))
    neighbours = _compared(queries, found, reference, k)
    asked = min(RECALL_QUERIES, len(queries))
    sample = generator.choice(len(queries), asked, replace=False)
    exact = nearest_neighbours(queries[sample], reference(), k).rows
    shared = [
        len(np.intersect1d(*each)) for each in zip(exact, neighbours.rows[sample], strict=True)
    ]
    recall = float(np.sum(shared)) / exact.size
    about = f"{name}, {index.nprobe} lists, {found.shape[1]} candidates"
    return Approximation(neighbours, recall, asked, about)


def _built(
    reference: Reference,
    shape: tuple[int, int],
    name: str,
    trained_on: int,
    generator: np.random.Generator,
) -> Any:
    """Return an index of all rows, its lists and codes learned from some of them."""
    try:
        import faiss  # heavy, and not needed by the other measures
    except ImportError as error:
        raise EvaluationError(
            f"eval.knn_search is 'ivf-pq', but FAISS cannot be imported ({error}). FAISS was "
            f"expected for it. Install faiss-cpu, or set eval.knn_search = 'exact'."
        ) from error
    rows, dim = shape
    index: Any = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    chosen = np.sort(generator.choice(rows, min(rows, trained_on), replace=False))
    logger.info("learning %s from %d of %d rows", name, len(chosen), rows)
    index.train(_rows_of(reference(), chosen, dim))
    for block in normalised_blocks(reference(), dim):
        index.add(block)
    return index


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
    reference: Reference,
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
            answering = block[found.ravel()[pairs] - start]
            cosines[pairs] = np.einsum("ij,ij->i", queries[pairs // found.shape[1]], answering)
        start += len(block)
    return nearest_of(cosines.reshape(found.shape), found, k)


EXACT_BYTES = 1 << 29  # float32 rows that are scanned within 100 ms, and kept in memory
LISTS, LEARNED_FROM = 1024, 64 * 1024
PROBES = 128  # of the lists: texts lie far from all images, so that few lists would miss much
COMPARED = 16  # rows for each neighbour that is asked for, before they are compared exactly


@dataclass(frozen=True)
class RowSearch:
    """Finds the rows nearest to one vector, at once and again and again."""

    name: str
    """How, for the page."""
    find: Callable[[Float32[np.ndarray, "1 dim"], int], Neighbours]

    def __call__(self, query: Float32[np.ndarray, "dim"], k: int) -> Neighbours:
        """Return the k nearest rows, or all where there are fewer."""
        return self.find(unit_rows(query[None]), k)


def open_search(
    embeddings: Float16[np.ndarray, "rows dim"], path: Path, memory_bytes: int
) -> RowSearch:
    """Choose how rows are searched, by their number and the memory there may be.

    Args:
        embeddings: Normalised rows, mapped from a file.
        path: Where a FAISS index of them is, or is to be; its name stands for the rows in it.
        memory_bytes: What one index may take.
    """
    rows, dim = embeddings.shape
    exact_bytes = rows * dim * 4
    is_fast = exact_bytes <= EXACT_BYTES or rows < LEARNED_FROM
    if rows and is_fast and exact_bytes <= memory_bytes:
        held = unit_rows(embeddings)
        return RowSearch(
            "exact", lambda query, k: Neighbours(*flat_search().search(query, held, min(k, rows)))
        )
    if rows >= LEARNED_FROM and rows * (dim + 8) <= memory_bytes:
        return _approximate_search(embeddings, path)
    return RowSearch(
        "exact, from disk",
        lambda query, k: nearest_neighbours(query, blocks_of(embeddings), min(k, rows)),
    )


def _approximate_search(embeddings: Float16[np.ndarray, "rows dim"], path: Path) -> RowSearch:
    """Open the index at a path, or build it there.

    Its codes have a byte for each number, so finer ones than those of `approximate_neighbours`:
    captions lie far from all images, where cosines differ by little.
    """
    import faiss

    if not is_sealed(path):
        logger.info("building a FAISS index of %d rows, once", len(embeddings))
        reference, generator = partial(blocks_of, embeddings), np.random.default_rng(0)
        name = f"IVF{LISTS},SQ8"
        built = _built(reference, embeddings.shape, name, LEARNED_FROM, generator)
        with appearing(path) as partial_path:
            with partial_path.open("wb") as file:
                # Given a path, it only prints that its last write has failed.
                faiss.write_index(built, cast(Any, faiss).PyCallbackIOWriter(file.write, 1 << 20))
            seal(partial_path, path.name)
    index = faiss.read_index(str(path))
    lists = faiss.extract_index_ivf(index)
    lists.parallel_mode = 1  # over the lists of one query, not over queries
    lists.nprobe = PROBES

    def find(query: Float32[np.ndarray, "1 dim"], k: int) -> Neighbours:
        _, places = index.search(query, min(k * COMPARED, len(embeddings)))
        rows = np.sort(places[places >= 0])
        cosines = embeddings[rows].astype(np.float32) @ query[0]
        return nearest_of(cosines[None], rows[None], k)

    return RowSearch("approximate", find)
