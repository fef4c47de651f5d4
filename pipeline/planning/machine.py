"""Short measurements of a machine: its disk, its decoding, and whether faiss finds neighbours."""

import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from features.images import decode

BLOCK = 8 << 20
MEGABYTE = 1e6
PHOTO = (640, 480)


def disk_megabytes_per_second(
    folder: Path, *, seconds: float, megabytes: int = 512
) -> tuple[float, float]:
    """Write and read a temporary file in a folder; return both speeds.

    What is written is forced to the disk, and dropped from the page cache before it is read, as far
    as the system does so.

    Args:
        folder: Where; nothing is left there.
        seconds: What writing may take; the file is as long as that allows.
        megabytes: And at most this long.

    Raises:
        OSError: The folder cannot be written.
    """
    block = np.random.default_rng(0).bytes(BLOCK)  # nothing that a file system could compress
    with tempfile.NamedTemporaryFile(prefix=".sail-doctor-", dir=folder, buffering=0) as file:
        written, started = 0, time.perf_counter()
        while written < megabytes * MEGABYTE and time.perf_counter() - started < seconds:
            written += file.write(block)
        os.fsync(file.fileno())
        write_seconds = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer, started = bytearray(BLOCK), time.perf_counter()
        while file.readinto(buffer):
            pass
        read_seconds = max(time.perf_counter() - started, 1e-9)
    return written / MEGABYTE / write_seconds, written / MEGABYTE / read_seconds


def decoded_per_second(*, seconds: float) -> float:
    """Return how many JPEGs of 640 × 480 pixels one core decodes and resizes to 224 a second."""
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photo = io.BytesIO()
    Image.fromarray(small).resize(PHOTO, Image.Resampling.BICUBIC).save(photo, "JPEG", quality=90)
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < seconds:
        picture = decode(photo.getvalue(), max_pixels=PHOTO[0] * PHOTO[1])
        picture.resize((224, 224), Image.Resampling.BICUBIC)
        count += 1
    return count / (time.perf_counter() - started)


def faiss_finds_neighbours() -> bool:
    """Search a small set of vectors, and return whether the nearest are those worked out here."""
    import faiss

    vectors = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    _, found = index.search(vectors[:20], 3)
    expected = np.argsort(-(vectors[:20] @ vectors.T), axis=1)[:, :3]
    return bool((found == expected).all())
