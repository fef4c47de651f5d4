"""How long the page of `sail explore` takes to answer among a million rows, and what it misses.

    python -m tests.benchmarks.explore [--rows N] [--json]

The rows have no clusters that an index could find by chance: Gaussian, with variances that fall as
those of real embeddings do (the i-th as 1/i). A query lies as far from all images as a caption does
from images (the modality gap), in the direction of a row with as much noise again. Recall is the
share of the ten nearest of the exact search. One query at a time, on all processors, files in the
page cache. An answer is the search for 24 rows, and their keys and captions from the store, as the
page shows them; the encoding of the words, which depends on the encoder, is not in it.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from numpy.lib.format import open_memmap

from evaluate.nearest import nearest_neighbours, open_search
from features.store import FORMAT, FeatureStore
from tests.benchmarks.figure import Figure, figure_of

ROWS, DIM, QUERIES, TOP, SHOWN, ROWS_AT_ONCE = 1_000_000, 768, 50, 10, 24, 65_536
GAP = 0.8
MEMORY_BYTES = 2 << 30


def measure(rows: int = ROWS) -> list[Figure]:
    """Return milliseconds of a search, and its recall."""
    with tempfile.TemporaryDirectory() as folder:
        embeddings, queries = written(Path(folder) / "rows.npy", rows)
        store = store_of(Path(folder) / "rows.zarr", rows)
        search = open_search(embeddings, Path(folder) / "rows.faiss", MEMORY_BYTES)
        if search.name != "approximate":
            raise SystemExit(f"{rows} rows are searched {search.name}: there is nothing to measure")
        milliseconds, found = [], []
        search(queries[0], SHOWN)  # the file comes into the page cache
        for query in queries:
            started = time.perf_counter()
            places = search(query, SHOWN).rows[0]
            for name in ("key", "caption/long"):
                store.strings_at(name, places)
            milliseconds.append(1000 * (time.perf_counter() - started))
            found.append(places[:TOP])
        exact = nearest_neighbours(queries, blocks(embeddings), TOP).rows
    shared = [len(np.intersect1d(*pair)) for pair in zip(found, exact, strict=True)]
    recall = float(np.mean(shared)) / TOP
    size = f"{rows:,} × {DIM}"
    return [
        figure_of(
            f"answer of the page, {size}, one query",
            milliseconds,
            unit="ms",
            goal=100.0,
            direction="max",
            module="explore",
        ),
        figure_of(
            f"recall@{TOP} of that search against the exact one, mean of {QUERIES} queries",
            [recall],
            unit="fraction",
            goal=0.95,
            direction="min",
            module="explore",
        ),
    ]


def store_of(path: Path, rows: int) -> FeatureStore:
    """Write a store with keys and captions of sixty characters, and no features."""
    about = {"format": FORMAT, "format_version": 1, "keys_sha256": "", "source": {}}
    group = zarr.create_group(path, attributes=about | {"rows": rows, "rows_per_chunk": 4096})
    for name in ("key", "caption/long"):
        array = group.create_array(name, shape=(rows,), chunks=(4096,), dtype="string")
        for start in range(0, rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, rows)
            words = [
                f"{name} of sixty characters or so, as are usual {i:08d}"
                for i in range(start, stop)
            ]
            array[start:stop] = np.array(words, dtype=np.dtypes.StringDType())
    return FeatureStore.open(path)


def blocks(embeddings: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows, some at a time."""
    for start in range(0, len(embeddings), ROWS_AT_ONCE):
        yield embeddings[start : start + ROWS_AT_ONCE]


def written(path: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Write embeddings, and return them mapped, with queries."""
    generator = np.random.default_rng(0)
    spread = (1 / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)
    spread /= np.linalg.norm(spread)
    gap = generator.standard_normal(DIM, dtype=np.float32)
    gap *= GAP / np.linalg.norm(gap)
    embeddings = open_memmap(path, "w+", dtype="<f2", shape=(rows, DIM))
    chosen = generator.choice(min(rows, ROWS_AT_ONCE), QUERIES, replace=False)
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        block = generator.standard_normal((count, DIM), dtype=np.float32) * spread
        if not start:
            noise = generator.standard_normal((QUERIES, DIM), dtype=np.float32) * spread
            queries = block[chosen] + noise - gap / 2
        block += gap / 2
        embeddings[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return embeddings, queries


if __name__ == "__main__":
    wanted = int(sys.argv[sys.argv.index("--rows") + 1]) if "--rows" in sys.argv else ROWS
    for figure in measure(wanted):
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
