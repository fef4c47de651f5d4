"""Measures for some seconds what the phases of stage one do on this machine, with its own parts."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import zarr
from torch.utils.flop_counter import FlopCounterMode

from features.column import Column, create_column
from features.encoders import ImageEncoder, TextEncoder
from features.images import ImageFault
from features.index import Index, SampleReader
from features.status import Status

T = TypeVar("T")
SAMPLES = 512
ROWS_READ_AT_ONCE = 32


@dataclass(frozen=True)
class ImageRates:
    """Images a second; of reading and decoding, by one thread."""

    read: float
    decode: float
    encode: float
    copy: float | None
    """To the device; None where there is none to copy to."""
    flops: float
    """FLOPs of one image, as torch counts them."""
    image_bytes: float
    """Bytes of an encoded image."""
    images: int
    """Different images that were decoded."""


@dataclass(frozen=True)
class CaptionRates:
    """Captions a second."""

    tokenise: float
    encode: float
    tokens: float
    """Mean length."""
    captions: int
    """Different captions that were encoded."""


def measure_images(
    encoder: ImageEncoder, index: Index, *, max_pixels: int, seconds: float
) -> ImageRates | None:
    """Read, decode and encode images of an index; None if none of the first can be decoded."""
    part = seconds / 3
    encoded = _first_images(SampleReader(index, max_pixels=max_pixels), part)
    images, sizes, read_seconds = encoded
    if not images:
        return None
    pixels: list[np.ndarray] = []

    def decode_one(data: bytes) -> None:
        try:
            picture = encoder.prepare(data, max_pixels=max_pixels)
        except ImageFault:
            return
        if len(pixels) < encoder.batch_size:
            pixels.append(picture)

    decode_one(images[0])  # the warm-up: libraries load with the first
    decoded = _per_second(decode_one, itertools.cycle(images), part)
    if not pixels:
        return None
    batch = torch.from_numpy(np.stack(pixels))
    with FlopCounterMode(display=False) as counter:
        _encode(encoder, batch)  # also the warm-up
    batches = _per_second(lambda one: _encode(encoder, one), itertools.repeat(batch), part)
    return ImageRates(
        read=len(images) / read_seconds,
        decode=decoded,
        encode=batches * len(batch),
        copy=_copied_per_second(batch, encoder.device),
        flops=counter.get_total_flops() / len(batch),
        image_bytes=float(np.mean(sizes)),
        images=len(images),
    )


def measure_captions(
    encoder: TextEncoder, captions: Sequence[str], *, seconds: float
) -> CaptionRates | None:
    """Tokenise and encode captions; None if all are empty."""
    texts = [caption for caption in dict.fromkeys(captions) if caption.strip()]
    if not texts:
        return None
    started = time.perf_counter()
    tokens = encoder.tokenise(texts)
    tokenised = len(texts) / _since(started)
    few = tokens[: max(1, min(len(tokens), 64))]
    encoder.encode_tokens(few)  # the warm-up
    rate, size, next_size = 0.0, 0, len(few)
    deadline = time.perf_counter() + seconds
    while next_size > size:  # as many at once as there is time for; fewer would say less
        size = next_size
        chosen = list(itertools.islice(itertools.cycle(tokens), size))
        started = time.perf_counter()
        encoder.encode_tokens(chosen)
        rate = size / _since(started)
        next_size = min(4 * size, round(rate * (deadline - time.perf_counter())))
    lengths = [len(each) for each in tokens]
    return CaptionRates(tokenised, rate, float(np.mean(lengths)), len(texts))


def measure_writing(folder: Path, dim: int, rows_per_chunk: int, *, seconds: float) -> float:
    """Return the rows a second of a column that is written at `folder`, an empty one."""
    rows = 16 * rows_per_chunk
    create_column(zarr.create_group(folder).create_group("image/trial"), rows, dim, rows_per_chunk)
    column = Column(folder, "image/trial")
    features = np.ones((rows_per_chunk, dim), dtype=np.float16)
    status = np.full(rows_per_chunk, Status.OK, dtype=np.uint8)
    chunks = itertools.cycle(range(column.num_chunks))
    per_second = _per_second(lambda chunk: column.write(chunk, features, status), chunks, seconds)
    return per_second * rows_per_chunk


def _encode(encoder: ImageEncoder, batch: torch.Tensor) -> None:
    """Encode a batch for all columns, and wait until that is done."""
    for features in encoder.encode(batch):
        features.cpu()


def _first_images(reader: SampleReader, seconds: float) -> tuple[list[bytes], list[int], float]:
    """Read images from the front of an index; return them, their sizes, and the time it took."""
    images: list[bytes] = []
    started = time.perf_counter()
    stop = min(reader.index.rows, SAMPLES)
    for start in range(0, stop, ROWS_READ_AT_ONCE):
        found = reader.read(start, min(start + ROWS_READ_AT_ONCE, stop))
        images += [image for image in found if image]
        if _since(started) > seconds:
            break
    return images, [len(image) for image in images], _since(started)


def _per_second(work: Callable[[T], object], items: Iterator[T], seconds: float) -> float:
    """Do work on items one after the other for so long; return how many a second."""
    count, started = 0, time.perf_counter()
    while count == 0 or _since(started) < seconds:
        work(next(items))
        count += 1
    return count / _since(started)


def _copied_per_second(batch: torch.Tensor, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    pinned = batch.pin_memory()
    started = time.perf_counter()
    for _ in range(10):
        pinned.to(device, non_blocking=True)
    torch.cuda.synchronize(device)
    return 10 * len(batch) / _since(started)


def _since(started: float) -> float:
    return max(time.perf_counter() - started, 1e-9)
