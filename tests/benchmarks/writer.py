"""Rows per second through the writer of stage one against plain writes of the same files.

A synthetic encoder gives blocks of random float16 rows; they go through `features.extract.Writer`
into a column (checksums, fsyncs, renames and status chunks included). Beside it, the same bytes are
written to as many files of the same sizes, one after the other, as `dd` would. Both end with an
fsync of every file, inside the time; the two take turns.

What the order costs that a power cut cannot change (an fsync of each chunk before the next file is
named) is measured by the same writer without it.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import zarr

from features.extract import Phases, Writer
from features.status import Status
from features.storage.column import Column, create_column
from tests.benchmarks.figure import Figure, figure_of

ROWS_PER_CHUNK = 4096


def synchronise(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def seconds_of_plain_writes(folder: Path, blocks: list[np.ndarray], chunks: int) -> float:
    """Write the features and the status of the chunks as files, with nothing else."""
    folder.mkdir()
    status = bytes(ROWS_PER_CHUNK)
    started = time.perf_counter()
    for chunk in range(chunks):
        (folder / f"{chunk}").write_bytes(blocks[chunk % len(blocks)].data)
        (folder / f"{chunk}.status").write_bytes(status)
    synchronise(folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def seconds_of_writer(folder: Path, blocks: list[np.ndarray], chunks: int) -> float:
    """Write the chunks as stage one does."""
    dim = blocks[0].shape[1]
    group = zarr.create_group(folder / "image" / "synthetic")
    create_column(group, chunks * ROWS_PER_CHUNK, dim, ROWS_PER_CHUNK)
    column = Column(folder, "image/synthetic")
    status = np.full(ROWS_PER_CHUNK, Status.OK, dtype=np.uint8)
    started = time.perf_counter()
    with Writer(Phases()) as writer:
        for chunk in range(chunks):
            writer.put(column, chunk, blocks[chunk % len(blocks)], status)
    synchronise(folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def seconds_without_order(folder: Path, blocks: list[np.ndarray], chunks: int) -> float:
    """Write the chunks as stage one does, but with one fsync of everything, at the end."""
    with patch("features.storage.files.synchronise"):
        return seconds_of_writer(folder, blocks, chunks)


def measure(
    rows: int = 1_000_000, dim: int = 1024, rounds: int = 3, chunks_in_order: int = 200
) -> list[Figure]:
    """Return the ratio of the two speeds, and that of the speeds with and without the order."""
    random = np.random.default_rng(0)
    blocks = [
        random.standard_normal((ROWS_PER_CHUNK, dim), dtype=np.float32).astype(np.float16)
        for _ in range(4)
    ]
    chunks = -(-rows // ROWS_PER_CHUNK)
    ratios, in_order = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            plain = seconds_of_plain_writes(folder / "plain", blocks, chunks)
            ratios.append(plain / seconds_of_writer(folder / "store.zarr", blocks, chunks))
            ways = [seconds_without_order, seconds_of_writer]
            first, second, third, fourth = (  # the later ones find memory that is used already
                way(folder / "store.zarr", blocks, chunks_in_order) for way in ways + ways[::-1]
            )
            in_order.append((first + fourth) / (second + third))
    return [
        figure_of(
            f"writer / plain sequential writes with fsync, {rows:,} rows of {dim}",
            ratios,
            unit="ratio of rows/s",
            goal=0.8,
            direction="min",
            module="writer",
        ),
        figure_of(
            f"writer with an fsync of each chunk / with one at the end, {chunks_in_order} of {dim}",
            in_order,
            unit="ratio of rows/s",
            goal=0.7,
            direction="min",
            module="writer",
        ),
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
