"""CIFAR-10 and CIFAR-100 as their authors publish them, in the binary version.

A record is the label (CIFAR-100: the coarse label, then the fine one) and 32 × 32 bytes of red, of
green and of blue. The version "for Python" is pickled, which could run any program: never read.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from features.class_lists import check_order
from features.config import CifarSource
from features.errors import SourceError
from features.sources.reader import Counts, Keys, Sample, read_class_names
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


class CifarBatches:
    """The binary files of one split."""

    def __init__(self, source: CifarSource) -> None:
        there = set(files.names(source.path))
        layout = CIFAR_100 if CIFAR_100.names in there else CIFAR_10
        wanted = (*layout.splits[source.split], layout.names)
        if missing := [name for name in wanted if name not in there]:
            pickled = {"data_batch_1", "test_batch", "train", "test"} & there
            raise SourceError(
                f"{source.path} has no {missing[0]}"
                + (f"; its {min(pickled)} is pickled, which is never read. " if pickled else ". ")
                + "The binary version of CIFAR-10 or CIFAR-100 was expected. Take "
                "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz from its authors' page."
            )
        self.files = {source.path / name: PurePosixPath(name).stem for name in wanted[:-1]}
        self._layout, self._source = layout, source

    def class_names(self) -> tuple[str, ...]:
        """Return the names that the recipe gives, or the data set's own.

        Raises:
            SourceError: Both name them, in another order.
        """
        place = self._source.path / self._layout.names
        own = tuple(files.read(place).decode().split())
        given = read_class_names(self._source.class_names)
        if given is None:
            return tuple(name.replace("_", " ") for name in own)
        by = f"class_names = {self._source.class_names}"
        check_order(given, own, given_by=by, own_by=str(place))
        return given

    def check(self) -> None:
        """Accept any settings: there are no captions to look for."""

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield the images of one file in their order.

        Raises:
            SourceError: It does not consist of whole records.
        """
        layout, keys = self._layout, Keys(self.files[file], counts)
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


def as_image_file(planes: bytes) -> bytes:
    """Return the pixels of a record as an image file (PPM), which any decoder reads."""
    pixels = np.frombuffer(planes, dtype=np.uint8).reshape(3, SIDE, SIDE)
    return PPM_HEADER + pixels.transpose(1, 2, 0).tobytes()
