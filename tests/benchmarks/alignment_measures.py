"""Seconds and peak memory of the alignment measures of `sail eval` over a million pairs.

    python -m tests.benchmarks.alignment_measures [--rows N] [--json]

Image and text features share some directions amid noise. CKA is summed over all pairs; mutual k-NN
is that of `eval.alignment_held` pairs, their neighbours sought exactly among all on both sides;
each with its null and its interval, as by default. The measures run in a process of their own,
whose peak the operating system tells.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr

from evaluate.measures.alignment import AlignmentSettings, alignment_values
from features.status import Status
from features.storage.column import create_column
from features.store import FORMAT, FeatureStore
from tests.benchmarks.figure import Figure, figure_of
from tests.peak_memory import peak_bytes_of

ROWS, IMAGE_DIM, TEXT_DIM, SHARED, ROWS_PER_CHUNK = 1_000_000, 256, 512, 32, 4096
IMAGE, TEXT = "image/synthetic", "text/synthetic/0"


def measure(rows: int = ROWS) -> list[Figure]:
    """Return the seconds and the peak."""
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder) / "s.zarr", rows)
        child = ["-m", "tests.benchmarks.alignment_measures", "--store", str(store.path)]
        peak, told = peak_bytes_of(child)
    taken = json.loads(told.splitlines()[-1])
    names = ", ".join(taken["values"])
    size = f"{rows:,} × {IMAGE_DIM} against {TEXT_DIM}"
    return [
        figure_of(
            f"{what} of {names}, {size}",
            [value],
            unit=unit,
            goal=goal,
            direction="max",
            module="alignment_measures",
        )
        for what, value, unit, goal in (
            ("time", taken["seconds"], "s", 600.0),
            ("peak memory", peak / 1e9, "GB", 2.0),
        )
    ]


def store_of(path: Path, rows: int) -> FeatureStore:
    """Write a store of features alone."""
    about = {"format": FORMAT, "format_version": 1, "keys_sha256": "", "source": {}}
    shape = {"rows": rows, "rows_per_chunk": ROWS_PER_CHUNK}
    group = zarr.create_group(path, attributes=about | shape)
    dims = {IMAGE: IMAGE_DIM, TEXT: TEXT_DIM}
    for name, dim in dims.items():
        create_column(group.create_group(name), rows, dim, ROWS_PER_CHUNK, identified=False)
    store = FeatureStore.open(path)
    generator = np.random.default_rng(0)
    mixes = {
        name: generator.standard_normal((SHARED, dim), dtype=np.float32)
        for name, dim in dims.items()
    }
    columns = {name: store.column(name) for name in dims}
    for chunk in range(columns[IMAGE].num_chunks):
        count = columns[IMAGE].chunk_rows(chunk)
        shared = generator.standard_normal((count, SHARED), dtype=np.float32)
        status = np.full(count, Status.OK, dtype=np.uint8)
        for name, dim in dims.items():
            noise = 4 * generator.standard_normal((count, dim), dtype=np.float32)
            columns[name].write(chunk, (shared @ mixes[name] + noise).astype(np.float16), status)
    return store


def main(path: str) -> None:
    """Take the measures of all pairs of a store, and say in JSON on stderr how long it took."""
    store = FeatureStore.open(Path(path))
    image, text = store.column(IMAGE), store.column(TEXT)
    started = time.perf_counter()
    values = {
        found.name: round(found.calibrated.value, 6)
        for found in alignment_values(
            image.blocks,
            text.blocks,
            np.intersect1d(image.ok_rows(), text.ok_rows()),
            AlignmentSettings(alignment_rows=store.rows),
        )
    }
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": round(seconds, 2), "values": values}), file=sys.stderr)


if __name__ == "__main__":
    if "--store" in sys.argv:
        main(sys.argv[sys.argv.index("--store") + 1])
    else:
        wanted = int(sys.argv[sys.argv.index("--rows") + 1]) if "--rows" in sys.argv else ROWS
        for figure in measure(wanted):
            print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
