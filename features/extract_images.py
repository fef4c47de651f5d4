"""Stage one, images: one pass over the images fills all columns of an encoder."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Num, UInt8
from torch import Tensor

from features.column import Column
from features.column_group import ColumnGroup
from features.encoders.image import ImageEncoder
from features.extract import (
    Phases,
    Run,
    Writer,
    empty_chunk,
    log_faults,
    prefetch,
    without_infinities,
)
from features.feeding import Encoding, Feeder
from features.images import ImageFault
from features.index import Index, SampleReader
from features.status import Status


def extract_images(
    columns: ColumnGroup,
    index: Index,
    encoder: ImageEncoder,
    run: Run,
    chunks: Sequence[int] | None = None,
) -> Phases:
    """Encode the images of every chunk that is pending in any of an encoder's columns.

    Each image is decoded and encoded once, and only what is pending is computed and written. A row
    whose image cannot be read keeps its place: zeros, and a status that says why. When
    `run.should_stop()` turns true the chunk at hand is finished first.

    Args:
        columns: Columns made for `encoder`.
        index: Where the images are.
        encoder: Has a column of the same name for each.
        run: What every column of one extraction shares.
        chunks: Look at these chunks alone; at all if not given.
    """
    phases = Phases()
    reader = SampleReader(index)
    feeder = Feeder(encoder)
    made_by = {f"image/{column.name}": column for column in encoder.columns}

    def load(batch: _Batch) -> _Images:
        return _load_images(batch, reader, encoder, run.max_pixels)

    with ThreadPoolExecutor(run.workers) as pool, Writer(phases) as writer:
        batches = _batches(columns, chunks, encoder.batch_size)
        on_device: deque[tuple[_Images, Encoding]] = deque()
        with closing(prefetch(pool, load, batches, ahead=run.workers + 2, phases=phases)) as loaded:
            for images in loaded:
                chunk = images.batch.chunk
                if images.batch.start == chunk.start and run.should_stop():
                    break
                started = time.perf_counter()
                wanted = [made_by[column.name] for column in chunk.columns]
                on_device.append((images, feeder.start(images.pixels, wanted)))
                phases.encode += time.perf_counter() - started
                while len(on_device) > feeder.ahead:
                    _finish(*on_device.popleft(), writer, run, phases)
        while on_device:
            _finish(*on_device.popleft(), writer, run, phases)
    return phases


class _Chunk:
    """What one chunk becomes in the columns in which it is pending."""

    def __init__(self, number: int, columns: Sequence[Column]) -> None:
        self.number = number
        self.columns = columns
        self.start = number * columns[0].rows_per_chunk
        self.features = [empty_chunk(column, number)[0] for column in columns]
        self.status = empty_chunk(columns[0], number)[1]

    @property
    def stop(self) -> int:
        """Row behind the last."""
        return self.start + len(self.status)


@dataclass(frozen=True)
class _Batch:
    """Rows `start` to `stop` of the store, all in one chunk."""

    chunk: _Chunk
    start: int
    stop: int


@dataclass
class _Images:
    """A decoded batch: pixels of the rows that could be read, and the status of every row."""

    batch: _Batch
    status: UInt8[np.ndarray, "batch"]
    pixels: Num[Tensor, "ok 3 height width"]
    read_seconds: float
    decode_seconds: float
    faults: list[str] = field(default_factory=list)


def _batches(columns: ColumnGroup, chunks: Sequence[int] | None, size: int) -> Iterator[_Batch]:
    numbers = columns.pending(chunks)
    pending = {column.name: set(column.pending(numbers)) for column in columns}
    for number in numbers:
        chunk = _Chunk(number, [each for each in columns if number in pending[each.name]])
        for start in range(chunk.start, chunk.stop, size):
            yield _Batch(chunk, start, min(start + size, chunk.stop))


def _load_images(
    batch: _Batch, reader: SampleReader, encoder: ImageEncoder, max_pixels: int
) -> _Images:
    """Read and decode a batch; runs in a worker."""
    begun = time.perf_counter()
    samples = reader.read(batch.start, batch.stop)
    table = reader.index.rows_between(batch.start, batch.stop, ("problem",))
    problems = table.column("problem").to_numpy()
    read_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    status = np.full(len(samples), Status.OK, dtype=np.uint8)
    pixels: list[np.ndarray] = []
    faults: list[str] = []
    for i, data in enumerate(samples):
        if problems[i] or data is None:
            status[i] = problems[i] or Status.MISSING_IMAGE
            faults.append(f"row {batch.start + i}: {Status(int(status[i])).label}")
            continue
        try:
            pixels.append(encoder.prepare(data, max_pixels=max_pixels))
        except ImageFault as fault:
            status[i] = fault.status
            faults.append(f"row {batch.start + i}: {fault.status.label} ({fault.reason})")
    stacked = torch.from_numpy(
        np.stack(pixels) if pixels else np.empty((0, 3, 1, 1), dtype=np.uint8)
    )
    if encoder.device.type == "cuda":
        with torch.cuda.device(encoder.device):
            stacked = stacked.pin_memory()  # or the copy to the device would hold up the encoder
    decode_seconds = time.perf_counter() - begun
    return _Images(batch, status, stacked, read_seconds, decode_seconds, faults)


def _finish(images: _Images, encoding: Encoding, writer: Writer, run: Run, phases: Phases) -> None:
    """Put the features of a batch in their places, and write the chunk if it is the last of it."""
    started = time.perf_counter()
    chunk = images.batch.chunk
    first = images.batch.start - chunk.start
    chunk.status[first : first + len(images.status)] = images.status
    ok = first + np.flatnonzero(images.status == Status.OK)
    if len(ok):
        for target, features in zip(chunk.features, encoding(), strict=True):
            target[ok] = features
    phases.encode += time.perf_counter() - started
    phases.read += images.read_seconds
    phases.decode += images.decode_seconds
    log_faults(images.faults, phases)
    phases.rows += len(images.status)
    phases.faults += len(images.faults)
    run.on_rows(len(images.status))
    if images.batch.stop == chunk.stop:
        for column, features in zip(chunk.columns, chunk.features, strict=True):
            status = without_infinities(features, chunk.status.copy(), chunk.start, phases)
            writer.put(column, chunk.number, features, status)
