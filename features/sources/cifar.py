"""CIFAR-10 and CIFAR-100 as their authors publish them, in the binary version.

A record is the label (CIFAR-100: the coarse label, then the fine one) and 32 × 32 bytes of red, of
green and of blue. The version "for Python" is pickled, which could run any program: never read.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from features.config import DataPlace
from features.errors import SourceError
from features.sources.base import Counts, ImageReader, Known, Sample, SourceReader, SourceSettings
from features.storage import files
from features.storage.place import Place

SIDE = 32
IMAGE_BYTES = 3 * SIDE * SIDE
PPM_HEADER = b"P6 32 32 255\n"


class _Layout(NamedTuple):
    splits: dict[str, tuple[str, ...]]
    names: str
    """File with the names of the classes."""
    label: int
    """Place of the label in a record."""
    header: int
    """Bytes of a record before its pixels."""


CIFAR_10 = _Layout(
    {
        "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test": ("test_batch.bin",),
    },
    names="batches.meta.txt",
    label=0,
    header=1,
)
CIFAR_100 = _Layout(
    {"train": ("train.bin",), "test": ("test.bin",)},
    names="fine_label_names.txt",
    label=1,
    header=2,
)


class CifarSource(SourceSettings):
    """CIFAR-10 or CIFAR-100 in the binary version of its authors; the pickled one is refused."""

    kind: Literal["cifar"]
    path: DataPlace
    """Folder of the `.bin` files and the names of the classes."""
    split: Literal["train", "test"]
    """Which of the files."""

    unused = frozenset({"captions", "label", "group"})

    def _open(self, known: Known) -> "CifarBatches":
        there = set(files.names(self.path))
        layout = CIFAR_100 if CIFAR_100.names in there else CIFAR_10
        batches = layout.splits[self.split]
        if missing := [name for name in (*batches, layout.names) if name not in there]:
            pickled = {"data_batch_1", "test_batch", "train", "test"} & there
            raise SourceError(
                f"{self.path} has no {missing[0]}"
                + (f"; its {min(pickled)} is pickled, which is never read. " if pickled else ". ")
                + "The binary version of CIFAR-10 or CIFAR-100 was expected. Take "
                "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz from its authors' page."
            )
        return CifarBatches(self, [self.path / name for name in batches], known)

    def image_reader(self) -> ImageReader:
        """Return what makes image files of pixels."""
        return _PlaneReader()


class CifarBatches(SourceReader[CifarSource]):
    """Lists the records of the binary files of one split."""

    has_captions = False

    @property
    def _layout(self) -> _Layout:
        return CIFAR_10 if "batch" in next(iter(self.files)).name else CIFAR_100

    def own_class_names(self) -> tuple[tuple[str, ...], Place]:
        """Return the names of the data set itself."""
        place = self.source.path / self._layout.names
        names = files.read(place).decode().split()
        return tuple(name.replace("_", " ") for name in names), place

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield the images of one file in their order.

        Raises:
            SourceError: It does not consist of whole records.
        """
        layout, keys = self._layout, self.keys(file, counts)
        content = files.read(file)
        record = layout.header + IMAGE_BYTES
        if len(content) % record or not content:
            raise SourceError(
                f"{file} has {len(content)} bytes. Records of {record} bytes were expected. Fetch "
                f"it again."
            )
        for number, start in enumerate(range(0, len(content), record)):
            key, _ = keys.of(f"{number:05d}")
            label, offset = content[start + layout.label], start + layout.header
            yield Sample(key, str(file), offset=offset, size=IMAGE_BYTES, label=label)


class _PlaneReader(ImageReader):
    """Reads the pixels of records as image files (PPM), which any decoder reads."""

    def read(self, path: str, places: Sequence[tuple[int, int]]) -> Sequence[bytes | None]:
        """Return pixels as PPM files."""
        return [_as_ppm(planes) for planes in super().read(path, places) if planes]


def _as_ppm(planes: bytes) -> bytes:
    pixels = np.frombuffer(planes, dtype=np.uint8).reshape(3, SIDE, SIDE)
    return PPM_HEADER + pixels.transpose(1, 2, 0).tobytes()
