"""The loader's rows per second against raw `readinto` of the same files, page cache hot."""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from align.config import AlignConfig
from align.loader import MIB, Loader, LoaderOptions, Source
from align.selection import Columns, select_rows
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import synthetic_store


def seconds_of_raw_reads(columns: Columns) -> float:
    """Read every chunk into one buffer, as fast as the page cache gives it."""
    buffers = {
        column.name: np.empty((column.rows_per_chunk, column.dim), dtype=np.float16)
        for column in (columns.image, *columns.text)
    }
    started = time.perf_counter()
    for chunk in range(columns.image.num_chunks):
        for column in (columns.image, *columns.text):
            column.read_into(chunk, buffers[column.name])
    return time.perf_counter() - started


def measure(rows: int = 131_072, rounds: int = 5) -> list[Figure]:
    """Return the ratio of the two speeds."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder), rows=rows, image_dim=1024, text_dim=1024)
        columns = Columns.open(store, AlignConfig(), "synthetic", "synthetic")
        selection = select_rows(columns, holdout=0.0, holdout_rows=1)
        for _ in range(rounds):
            raw = seconds_of_raw_reads(columns)
            options = LoaderOptions(batch_size=8192, memory_bytes=256 * MIB)
            loader = Loader([Source(columns, selection.train, selection.text_ok)], options)
            used = 0
            started = time.perf_counter()
            for batch in loader.batches(0, loader.steps_per_epoch):
                used += len(batch.rows)
            seconds = time.perf_counter() - started
            ratios.append((used / seconds) / (rows / raw))
    return [
        figure_of(
            "loader / raw readinto, hot",
            ratios,
            unit="ratio of rows/s",
            goal=0.4,
            direction="min",
            module="loader",
        )
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
