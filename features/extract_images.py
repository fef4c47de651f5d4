"""Stage one, images: read, decode and encode the pending chunks of a column."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float16, Num, UInt8

from features.column import Column
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
from features.images import ImageFault, Preprocessing, decode
from features.index import Index, SampleReader
from features.status import Status


def extract_images(
    column: Column,
    index: Index,
    encoder: ImageEncoder,
    run: Run,
    chunks: Sequence[int] | None = None,
) -> Phases:
    """Encode the images of the pending chunks of a column.

    A row whose image cannot be read keeps its place: zeros, and a status that says why. When
    `run.should_stop()` turns true the chunk at hand is finished first.

    Args:
        column: Filled where it is pending.
        index: Where the images are.
        encoder: What the column was made for.
        run: What every column of one extraction shares.
        chunks: Look at these chunks alone; at all if not given.
    """
    phases = Phases()
    reader = SampleReader(index)
    chunks = column.pending(chunks)

    def load(batch: tuple[int, int]) -> _Images:
        return _load_images(reader, *batch, encoder.preprocessing, run.max_pixels)

    with ThreadPoolExecutor(run.workers) as pool, Writer(phases) as writer:
        batches = _batches(column, chunks, encoder.batch_size)
        loaded = prefetch(pool, load, batches, ahead=run.workers + 2, phases=phases)
        for chunk in chunks:
            if run.should_stop():
                break
            features, status = empty_chunk(column, chunk)
            first = chunk * column.rows_per_chunk
            for start in range(0, len(status), encoder.batch_size):
                images = next(loaded)
                rows = slice(start, start + len(images.status))
                _encode_images(encoder, images, features[rows], phases)
                status[rows] = images.status
                log_faults(images.faults, phases)
                run.on_rows(len(images.status))
            writer.put(column, chunk, features, without_infinities(features, status, first, phases))
    return phases


@dataclass
class _Images:
    """A decoded batch: pixels of the rows that could be read, and the status of every row."""

    start: int
    status: UInt8[np.ndarray, "batch"]
    pixels: Num[np.ndarray, "ok 3 height width"]
    read_seconds: float
    decode_seconds: float
    faults: list[str] = field(default_factory=list)


def _batches(column: Column, chunks: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    for chunk in chunks:
        first = chunk * column.rows_per_chunk
        stop = first + column.chunk_rows(chunk)
        for start in range(first, stop, size):
            yield start, min(start + size, stop)


def _load_images(
    reader: SampleReader, start: int, stop: int, preprocessing: Preprocessing, max_pixels: int
) -> _Images:
    """Read and decode rows `start` to `stop`; runs in a worker."""
    begun = time.perf_counter()
    samples = reader.read(start, stop)
    problems = reader.index.rows_between(start, stop, ("problem",)).column("problem").to_numpy()
    read_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    status = np.full(len(samples), Status.OK, dtype=np.uint8)
    pixels: list[np.ndarray] = []
    faults: list[str] = []
    for i, data in enumerate(samples):
        if problems[i] or data is None:
            status[i] = problems[i] or Status.MISSING_IMAGE
            faults.append(f"row {start + i}: {Status(int(status[i])).label}")
            continue
        try:
            pixels.append(preprocessing.apply(decode(data, max_pixels=max_pixels)))
        except ImageFault as fault:
            status[i] = fault.status
            faults.append(f"row {start + i}: {fault.status.label} ({fault.reason})")
    stacked = np.stack(pixels) if pixels else np.empty((0, 3, 1, 1), dtype=np.uint8)
    decode_seconds = time.perf_counter() - begun
    return _Images(start, status, stacked, read_seconds, decode_seconds, faults)


def _encode_images(
    encoder: ImageEncoder,
    images: _Images,
    features: Float16[np.ndarray, "batch dim"],
    phases: Phases,
) -> None:
    """Encode a batch into the rows of `features` that could be decoded."""
    started = time.perf_counter()
    if len(images.pixels):
        encoded = encoder.encode(torch.from_numpy(images.pixels))
        features[images.status == Status.OK] = encoded.half().cpu().numpy()
    phases.encode += time.perf_counter() - started
    phases.read += images.read_seconds
    phases.decode += images.decode_seconds
    phases.rows += len(images.status)
    phases.faults += len(images.faults)
