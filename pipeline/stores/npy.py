"""Arrays as NumPy saves them: `.npy` files, or the arrays of a `.npz`."""

import os
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from features.storage.reading import check_regular, npy_header, reading
from pipeline.stores.arrays import Arrays, of_form
from pipeline.stores.blocks import STRINGS

EXPECTED = of_form("NumPy arrays as `numpy.save` and `numpy.savez` write them")


def write_header(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    """Begin a `.npy` file; its values are to follow, row by row.

    `open_memmap` would end the process where the disk is full, with a signal and without a word.
    """
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)


class NpyArray:
    """One array in the `.npy` format, of which some rows are read at a time."""

    def __init__(self, place: Path, file: IO[bytes], size: int) -> None:
        """Read the header.

        Args:
            place: What the array is called in messages.
            file: The open file.
            size: Its bytes.

        Raises:
            SourceError: It is none, holds objects, lies in memory column by column, or is larger
                than its file.
        """
        self.place, self._file = place, file
        with reading(place, EXPECTED):
            self.shape, self.dtype = npy_header(file, size)
        self._data = file.tell()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop`.

        Raises:
            SourceError: The file ends before them.
        """
        shape = (stop - start, *self.shape[1:])
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        self._file.seek(self._data + start * row_bytes)
        content = self._file.read(row_bytes * (stop - start))
        if len(content) != row_bytes * (stop - start):
            raise EXPECTED.refusal(self.place, f"it ends before row {stop - 1}")
        values = np.frombuffer(content, dtype=self.dtype).reshape(shape)
        return values.astype(STRINGS) if self.dtype.kind == "U" else values


class NpyArrays(Arrays):
    """A `.npy` file, the `.npy` files of a folder by their names, or the arrays of a `.npz`."""

    expected = EXPECTED

    def _open(self, path: Path, stack: ExitStack) -> None:
        if path.suffix == ".npz":
            self.files, opened = (path,), self._members(path, stack)
        else:
            self.files = sorted(path.rglob("*.npy")) if path.is_dir() else (path,)
            if not self.files or not all(file.is_file() for file in self.files):
                raise EXPECTED.refusal(path, "there is no .npy file")
            folder = path if path.is_dir() else path.parent
            opened = {
                file.relative_to(folder).as_posix(): open_npy(file, stack) for file in self.files
            }
        for name, (file, size) in opened.items():
            array = NpyArray(path if path.name == name else path / name, file, size)
            self._add(name, array.shape, array.read)

    def _members(self, path: Path, stack: ExitStack) -> dict[str, tuple[IO[bytes], int]]:
        archive = stack.enter_context(zipfile.ZipFile(check_regular(path)))
        return {
            each.filename.removesuffix(".npy"): (
                stack.enter_context(archive.open(each)),
                each.file_size,
            )
            for each in archive.infolist()
        }


def open_npy(file: Path, stack: ExitStack) -> tuple[IO[bytes], int]:
    """Open a file until the stack ends; return it with its bytes."""
    opened = stack.enter_context(check_regular(file).open("rb"))
    return opened, os.fstat(opened.fileno()).st_size


read = NpyArrays
