"""k-NN search over a store's worth of rows against bare FAISS on arrays that are in memory.

The reference comes as float16 blocks from a mapped file, as from a store, and is normalised on the
way; bare is `faiss.knn` over the same rows as one normalised float32 array. Both are exact. The
peak of memory is that of a process which searches the rows of a store.

    python -m tests.benchmarks.knn [--full] [--json]

Ten thousand queries against the rows of the goal: reading and normalising a row costs the same for
any number of queries, so that fewer than in the goal are the harder case. `--full` takes the goal's
50,000, about twenty minutes each way on two cores.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import faiss
import numpy as np

from evaluate.nearest import nearest_neighbours
from features.storage import column
from features.storage.chunks import read_chunk
from features.store import FeatureStore
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import linked_store, synthetic_store
from tests.peak_memory import peak_bytes_of

DIM, K, ROWS_PER_BLOCK = 768, 20, 65_536


def blocks(reference: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows as a store gives them."""
    for start in range(0, len(reference), ROWS_PER_BLOCK):
        yield reference[start : start + ROWS_PER_BLOCK]


def measure(
    queries: int = 10_000, rows: int = 1_000_000, rounds: int = 1, checked_rows: int = 300_000
) -> list[Figure]:
    """Return the ratio of the times, the peak of memory of a search, and what checks cost."""
    return [_ratio(queries, rows, rounds), _peak(queries, rows), _checked(rows=checked_rows)]


def search(store: Path, queries: int) -> None:
    """Search as many queries among the rows of a store."""
    images = FeatureStore.open(store).column("image/synthetic")
    asked = np.random.default_rng(0).standard_normal((queries, DIM), dtype=np.float32)
    nearest_neighbours(asked, images.blocks(images.ok_rows()), K)


def _peak(queries: int, rows: int) -> Figure:
    with tempfile.TemporaryDirectory() as folder:
        gigabytes = 2 * (DIM + 1) * rows / 1e9
        store = linked_store(
            Path(folder) / "s.zarr", gigabytes=gigabytes, image_dim=DIM, text_dim=1
        )
        peak, _ = peak_bytes_of(
            ["-m", "tests.benchmarks.knn", "--search", str(store.path), str(queries)]
        )
    return figure_of(
        f"peak memory of k-NN, {queries} queries of {rows} × {DIM} from a store",
        [peak / 1e9],
        unit="GB",
        goal=2.0,
        direction="max",
        module="knn",
    )


def _checked(rows: int, queries: int = 1_000, rounds: int = 5) -> Figure:
    """Search with few queries, where reading is the most of the work: checked, and not."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder), rows=rows, image_dim=DIM, text_dim=1)
        search(Path(str(store.path)), queries)
        for _ in range(rounds):
            started = time.perf_counter()
            search(Path(str(store.path)), queries)
            checked = time.perf_counter() - started
            with (
                mock.patch.object(column, "read_chunk", unchecked),
                mock.patch.object(column.Column, "_check", return_value=None),
            ):
                started = time.perf_counter()
                search(Path(str(store.path)), queries)
                ratios.append(checked / (time.perf_counter() - started))
    return figure_of(
        f"k-NN from a store, checked / unchecked, {queries} queries of {rows} × {DIM}",
        ratios,
        unit="ratio of time",
        goal=1.1,
        direction="max",
        module="knn",
    )


def unchecked(place: Path, buffer: np.ndarray, *, verify: bool) -> int:
    """Read a chunk as `read_chunk` does, without its checksum."""
    del verify
    return read_chunk(place, buffer, verify=False)


def _ratio(queries: int, rows: int, rounds: int) -> Figure:
    generator = np.random.default_rng(0)
    asked = generator.standard_normal((queries, DIM), dtype=np.float32)
    faiss.normalize_L2(asked)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        reference = np.lib.format.open_memmap(
            Path(folder) / "rows.npy", "w+", dtype=np.float16, shape=(rows, DIM)
        )
        for block in blocks(reference):
            block[:] = generator.standard_normal(block.shape, dtype=np.float32)
        in_memory = np.asarray(reference, dtype=np.float32)
        faiss.normalize_L2(in_memory)
        for _ in range(rounds):
            started = time.perf_counter()
            cosines, _ = faiss.knn(asked, in_memory, K, metric=faiss.METRIC_INNER_PRODUCT)
            bare = time.perf_counter() - started
            started = time.perf_counter()
            found = nearest_neighbours(asked, blocks(reference), K)
            ratios.append((time.perf_counter() - started) / bare)
            np.testing.assert_allclose(found.cosines, cosines, atol=1e-5)
    return figure_of(
        f"k-NN from a mapped file / bare FAISS in memory, {queries} queries of {rows} × {DIM}",
        ratios,
        unit="ratio of time",
        goal=1.15,
        direction="max",
        module="knn",
    )


if __name__ == "__main__":
    if "--search" in sys.argv:
        search(Path(sys.argv[-2]), int(sys.argv[-1]))
    else:
        for figure in measure(50_000 if "--full" in sys.argv else 10_000):
            print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
