"""The loader's rows per second against raw `readinto` of the same files, and the released way.

Hot: the files are in the page cache, the loader's memory was touched before, and the raw reads are
made by as many threads into buffers of one chunk each that are used again. Cold: the page cache is
told to drop the files (`posix_fadvise`) before each of the two. Released: every row a Python object
in RAM, collated by `pad_sequence` on the main thread, as the official code does; its rows/s do not
count the time to load them.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from align.chunk_reader import READERS
from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.loader import MIB, Loader, LoaderOptions, Source
from features.storage.column import Column
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import synthetic_store

BATCH = 8192
EPOCHS = 4  # in one go where the files are hot: an epoch takes a tenth of a second


def rate_of_raw_reads(columns: Columns, threads: int = READERS) -> float:
    """Return the rows per second of reading every chunk, each thread into buffers of its own."""
    buffers = [  # of ones, so that their memory is touched
        [np.ones((column.rows_per_chunk, column.dim), dtype=np.float16) for column in _all(columns)]
        for _ in range(threads)
    ]

    def read(thread: int) -> None:
        for chunk in range(thread, columns.image.num_chunks, threads):
            for column, buffer in zip(_all(columns), buffers[thread], strict=True):
                column.read_into(chunk, buffer)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        for _ in pool.map(read, range(threads)):
            pass
    return columns.store.rows / (time.perf_counter() - started)


def loader_of(columns: Columns, batch_size: int, *, verify: bool = False) -> Loader:
    """Make a loader whose windows hold a fraction of the store."""
    selection = select_rows(columns, holdout=0.0, holdout_rows=1)
    whole = sum(2 * column.rows * column.dim for column in _all(columns))
    options = LoaderOptions(
        batch_size=batch_size, memory_bytes=max(whole // 2, 64 * MIB), verify=verify
    )
    return Loader([Source(columns, selection.train, selection.text_ok)], options)


def rate_of_loader(loader: Loader, first_epoch: int, epochs: int = 1) -> float:
    """Return the rows per second of some epochs."""
    steps, used = loader.steps_per_epoch, 0
    started = time.perf_counter()
    for batch in loader.batches(first_epoch * steps, (first_epoch + epochs) * steps):
        used += len(batch.rows)
    return used / (time.perf_counter() - started)


class Released(Dataset[tuple[Tensor, Tensor]]):
    """All rows in RAM, each a tensor of its own."""

    def __init__(self, columns: Columns) -> None:
        self.image, self.text = (
            [row for chunk in _chunks(column) for row in torch.from_numpy(chunk)]
            for column in _all(columns)
        )

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.image[index], self.text[index]


def rate_of_released(rows: Released, batch_size: int) -> float:
    """Return the rows per second of an epoch of the official code's way."""

    def collate(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        image, text = zip(*pairs, strict=True)
        return pad_sequence(list(image), batch_first=True), pad_sequence(
            list(text), batch_first=True
        )

    loader = DataLoader(rows, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    started = time.perf_counter()
    used = sum(len(image) for image, _ in loader)
    return used / (time.perf_counter() - started)


def drop_from_page_cache(columns: Columns) -> None:
    """Ask the system to forget the files of the features."""
    for column in _all(columns):
        for chunk in range(column.num_chunks):
            with Path(str(column.features_file(chunk))).open("rb") as file:
                os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(rows: int = 131_072, rounds: int = 5, batch_size: int = BATCH) -> list[Figure]:
    """Return the ratios, and what checking the crc32c costs."""
    hot, cold, released, verified, verified_cold, checked_cold = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder), rows=rows, image_dim=1024, text_dim=1024)
        columns = Columns.open(store, AlignConfig(), "synthetic", "synthetic")
        loader = loader_of(columns, batch_size)
        rate_of_loader(loader, 0)  # touches its memory
        for number in range(1, rounds + 1):
            raw = rate_of_raw_reads(columns)
            hot.append(rate_of_loader(loader, number, EPOCHS) / raw)
        in_ram = Released(columns)
        for number in range(1, rounds + 1):
            theirs = rate_of_released(in_ram, batch_size)
            released.append(rate_of_loader(loader, number) / theirs)
        del in_ram, loader
        for _ in range(rounds):
            drop_from_page_cache(columns)
            raw = rate_of_raw_reads(columns)
            drop_from_page_cache(columns)
            plain_cold = rate_of_loader(loader_of(columns, batch_size), 0)
            cold.append(plain_cold / raw)
            drop_from_page_cache(columns)
            checked = rate_of_loader(loader_of(columns, batch_size, verify=True), 0)
            verified_cold.append(checked / plain_cold)
            checked_cold.append(checked / raw)
            plain = rate_of_loader(loader_of(columns, batch_size), 0)
            checked = rate_of_loader(loader_of(columns, batch_size, verify=True), 0)
            verified.append(checked / plain)
    ratio = "ratio of rows/s"
    return [
        _figure("loader / raw readinto, hot", hot, ratio, 0.4),
        _figure("loader / raw readinto, cold", cold, ratio, 0.9),
        _figure("loader / the released way", released, ratio, 8),
        _figure("loader, first epoch with crc32c / without, hot", verified, ratio, None),
        _figure("loader, first epoch with crc32c / without, cold", verified_cold, ratio, 0.95),
        _figure("loader, first epoch with crc32c / raw readinto, cold", checked_cold, ratio, 0.95),
    ]


def _figure(name: str, values: list[float], unit: str, goal: float | None) -> Figure:
    return figure_of(name, values, unit=unit, goal=goal, direction="min", module="loader")


def _all(columns: Columns) -> tuple[Column, ...]:
    return (columns.image, *columns.text)


def _chunks(column: Column) -> Iterator[np.ndarray]:
    for chunk in range(column.num_chunks):
        buffer = np.empty((column.rows_per_chunk, column.dim), dtype=np.float16)
        rows = column.read_into(chunk, buffer)
        yield buffer[:rows]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
