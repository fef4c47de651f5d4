"""The nearest of many rows by cosine: exact as long as that is fast, else by a FAISS index."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float16, Float32, Int64

from evaluate.nearest import nearest_neighbours
from features.storage.files import appearing

logger = logging.getLogger(__name__)
EXACT_BYTES = 1 << 29  # float32 rows that are scanned within 100 ms, and kept in memory
ROWS_AT_ONCE = 1 << 16
LISTS = 1024
TRAINED_ON = 64 * LISTS
PROBES = 128  # of the lists: texts lie far from all images, so that few lists would miss much
CANDIDATES = 16  # for each neighbour that is asked for, before they are compared exactly


@dataclass(frozen=True)
class Found:
    """The nearest rows, nearest first."""

    cosines: Float32[np.ndarray, "k"]
    places: Int64[np.ndarray, "k"]
    """Positions among the embeddings."""


class ExactSearch:
    """Every row is compared, in memory."""

    name = "exact"

    def __init__(self, embeddings: Float16[np.ndarray, "rows dim"]) -> None:
        self._index = faiss.IndexFlatIP(embeddings.shape[1])
        for start in range(0, len(embeddings), ROWS_AT_ONCE):
            self._index.add(_normalised(embeddings[start : start + ROWS_AT_ONCE]))

    def __call__(self, query: Float32[np.ndarray, "dim"], k: int) -> Found:
        """Return the k nearest rows."""
        if not self._index.ntotal:
            return Found(np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))
        cosines, places = self._index.search(_normalised(query[None]), min(k, self._index.ntotal))
        return Found(cosines[0], places[0])


class MappedSearch:
    """Every row is compared, read from the file block by block: slow, in hardly any memory."""

    name = "exact, from disk"

    def __init__(self, embeddings: Float16[np.ndarray, "rows dim"]) -> None:
        self._embeddings = embeddings

    def __call__(self, query: Float32[np.ndarray, "dim"], k: int) -> Found:
        """Return the k nearest rows."""
        rows = self._embeddings
        blocks = (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))
        found = nearest_neighbours(query[None], blocks, min(k, len(rows)))
        return Found(found.cosines[0], found.rows[0])


class ApproximateSearch:
    """Rows in lists of near ones, as 8-bit codes; what the nearest lists give is compared exactly.

    Reference:
        Jégou et al. 2011, Product Quantization for Nearest Neighbor Search, section IV (the
        inverted file). The codes here are scalar, one byte a number.
    """

    name = "approximate"

    def __init__(self, embeddings: Float16[np.ndarray, "rows dim"], path: Path) -> None:
        """Open the index at a path, or build it there.

        Args:
            embeddings: Normalised rows, mapped from a file.
            path: Of the index; its name stands for the rows that are in it.
        """
        self._embeddings = embeddings
        if not path.is_file():
            logger.info("building a FAISS index of %d rows, once", len(embeddings))
            with appearing(path) as partial:
                faiss.write_index(_built(embeddings), str(partial))
        self._index = faiss.read_index(str(path))
        lists = faiss.extract_index_ivf(self._index)
        lists.parallel_mode = 1  # over the lists of one query, not over queries
        lists.nprobe = PROBES

    def __call__(self, query: Float32[np.ndarray, "dim"], k: int) -> Found:
        """Return the k nearest rows among those of the nearest lists."""
        query = _normalised(query[None])
        _, places = self._index.search(query, min(k * CANDIDATES, len(self._embeddings)))
        candidates = np.sort(places[0][places[0] >= 0])
        cosines = self._embeddings[candidates].astype(np.float32) @ query[0]
        order = np.argsort(-cosines, kind="stable")[:k]
        return Found(cosines[order], candidates[order])


Search = ExactSearch | MappedSearch | ApproximateSearch


def open_search(
    embeddings: Float16[np.ndarray, "rows dim"], path: Path, memory_bytes: int
) -> Search:
    """Choose how rows are searched, by their number and the memory there may be.

    Args:
        embeddings: Normalised rows, mapped from a file.
        path: Where a FAISS index of them is, or is to be.
        memory_bytes: What one index may take.
    """
    rows, dim = embeddings.shape
    exact_bytes = rows * dim * 4
    is_fast = exact_bytes <= EXACT_BYTES or rows < TRAINED_ON
    if is_fast and exact_bytes <= memory_bytes:
        return ExactSearch(embeddings)
    if rows >= TRAINED_ON and rows * (dim + 8) <= memory_bytes:
        return ApproximateSearch(embeddings, path)
    return MappedSearch(embeddings)


def _built(embeddings: Float16[np.ndarray, "rows dim"]) -> Any:
    rows, dim = embeddings.shape
    quantizer, code = faiss.IndexFlatIP(dim), faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(quantizer, dim, LISTS, code, faiss.METRIC_INNER_PRODUCT)
    chosen = np.sort(np.random.default_rng(0).choice(rows, TRAINED_ON, replace=False))
    index.train(_normalised(embeddings[chosen]))
    for start in range(0, rows, ROWS_AT_ONCE):
        index.add(_normalised(embeddings[start : start + ROWS_AT_ONCE]))
    return index


def _normalised(rows: np.ndarray) -> Float32[np.ndarray, "rows dim"]:
    whole = np.array(rows, dtype=np.float32, order="C")
    faiss.normalize_L2(whole)
    return whole
