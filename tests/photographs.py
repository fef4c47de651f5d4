"""Real photographs beside the repository, and pictures like them made on the spot."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def flickr(count: int) -> list[bytes]:
    """Photographs of Flickr8k as JPEGs; the test is skipped where they are not."""
    shard = SHARED / "flickr8k" / "train" / "train-00000.tar"
    if not shard.is_file():
        pytest.skip(f"{shard} is not there; the photographs are not part of the repository")
    photographs: list[bytes] = []
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                photographs.append(file.read())
            if len(photographs) == count:
                break
    return photographs


def synthetic(seed: int, width: int, height: int, *, coarseness: int = 8) -> Image.Image:
    """A smooth picture of random colours, with about as much detail as a photograph has."""
    random = np.random.default_rng(seed)
    grid = (height // coarseness + 1, width // coarseness + 1, 3)
    coarse = Image.fromarray(random.integers(0, 256, grid, dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def sideways(image: Image.Image, orientation: int, form: str = "JPEG") -> bytes:
    """A picture as the bytes of a file whose EXIF data say that it lies otherwise."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, form, exif=exif)
    return buffer.getvalue()


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    """A picture as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()
