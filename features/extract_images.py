"""Stage one, images: one pass over the images fills all columns of an encoder."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Num
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

ROWS_AT_ONCE = 32  # of one worker: few, so that all help with the first batch


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
    reader = SampleReader(index, max_pixels=run.max_pixels)
    feeder = Feeder(encoder)
    made_by = {f"image/{column.name}": column for column in encoder.columns}

    def load(part: _Part) -> _Loaded:
        return _load(part, reader, encoder, run.max_pixels)

    parts = _parts(columns, chunks, encoder)
    ahead = run.workers + 2 + encoder.batch_size // ROWS_AT_ONCE
    on_device: deque[tuple[_Batch, Encoding]] = deque()
    with ThreadPoolExecutor(run.workers) as pool, Writer(phases) as writer:
        with closing(prefetch(pool, load, parts, ahead=ahead, phases=phases)) as all_loaded:
            for loaded in all_loaded:
                batch = loaded.part.batch
                if loaded.part.start == batch.chunk.start and run.should_stop():
                    break
                loaded.count(phases)
                if loaded.part.stop < batch.stop:
                    continue
                started = time.perf_counter()
                wanted = [made_by[column.name] for column in batch.chunk.columns]
                on_device.append((batch, feeder.start(batch.decoded(), wanted)))
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
    """Rows `start` to `stop` of the store, all in one chunk, and room for their pixels."""

    chunk: _Chunk
    start: int
    stop: int
    pixels: Num[Tensor, "batch 3 height width"]

    @property
    def ok(self) -> Bool[np.ndarray, "batch"]:
        """Which of the rows could be decoded."""
        first = self.chunk.start
        rows: np.ndarray = self.chunk.status[self.start - first : self.stop - first] == Status.OK
        return rows

    def decoded(self) -> Num[Tensor, "ok 3 height width"]:
        """Return the pixels of those rows."""
        return self.pixels if self.ok.all() else self.pixels[torch.from_numpy(self.ok)]


@dataclass(frozen=True)
class _Part:
    """Rows of a batch that one worker decodes; no two share a row."""

    batch: _Batch
    start: int
    stop: int


@dataclass
class _Loaded:
    """How it went with a part; pixels and status are in their places."""

    part: _Part
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def count(self, phases: Phases) -> None:
        """Add it to what is told of the column in the end."""
        phases.read += self.read_seconds
        phases.decode += self.decode_seconds
        log_faults(self.faults, phases)
        phases.faults += len(self.faults)


def _parts(
    columns: ColumnGroup, chunks: Sequence[int] | None, encoder: ImageEncoder
) -> Iterator[_Part]:
    numbers = columns.pending(chunks)
    pending = {column.name: set(column.pending(numbers)) for column in columns}
    for number in numbers:
        chunk = _Chunk(number, [each for each in columns if number in pending[each.name]])
        for start in range(chunk.start, chunk.stop, encoder.batch_size):
            stop = min(start + encoder.batch_size, chunk.stop)
            batch = _Batch(chunk, start, stop, encoder.room_for(stop - start))
            for first in range(start, stop, ROWS_AT_ONCE):
                yield _Part(batch, first, min(first + ROWS_AT_ONCE, stop))


def _load(part: _Part, reader: SampleReader, encoder: ImageEncoder, max_pixels: int) -> _Loaded:
    """Read and decode some rows; runs in a worker."""
    loaded = _Loaded(part)
    begun = time.perf_counter()
    samples = reader.read(part.start, part.stop)
    table = reader.index.rows_between(part.start, part.stop, ("problem", "key", "path"))
    problems, keys = table.column("problem").to_numpy(), table.column("key")
    loaded.read_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    first = part.start - part.batch.chunk.start
    status = part.batch.chunk.status[first : first + len(samples)]  # a view, as the next one
    pixels = part.batch.pixels[part.start - part.batch.start :].numpy()
    for i, data in enumerate(samples):
        status[i] = Status.OK
        if problems[i] or data is None:
            status[i] = problems[i] or Status.MISSING_IMAGE
            reason = f"{Status(int(status[i])).label}, {table.column('path')[i]}"
            loaded.faults.append(f"row {part.start + i} ({keys[i]}): {reason}")
            continue
        try:
            pixels[i] = encoder.prepare(data, max_pixels=max_pixels)
        except ImageFault as fault:
            status[i] = fault.status
            reason = f"{fault.status.label}, {fault.reason}"
            loaded.faults.append(f"row {part.start + i} ({keys[i]}): {reason}")
    loaded.decode_seconds = time.perf_counter() - begun
    return loaded


def _finish(batch: _Batch, encoding: Encoding, writer: Writer, run: Run, phases: Phases) -> None:
    """Put the features of a batch in their places, and write the chunk if it is the last of it."""
    started = time.perf_counter()
    chunk = batch.chunk
    ok = batch.start - chunk.start + np.flatnonzero(batch.ok)
    if len(ok):
        for target, features in zip(chunk.features, encoding(), strict=True):
            target[ok] = features
    phases.encode += time.perf_counter() - started
    phases.rows += batch.stop - batch.start
    run.on_rows(batch.stop - batch.start)
    if batch.stop == chunk.stop:
        for column, features in zip(chunk.columns, chunk.features, strict=True):
            status = without_infinities(features, chunk.status.copy(), chunk.start, phases)
            writer.put(column, chunk.number, features, status)
