"""Arrays as NumPy saves them: `.npy` files, or the arrays of a `.npz`."""

import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from pipeline.stores.arrays import Arrays, unreadable
from pipeline.stores.blocks import STRINGS

EXPECTED = "NumPy arrays as `numpy.save` and `numpy.savez` write them"


def write_header(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    """Begin a `.npy` file; its values are to follow, row by row.

    `open_memmap` would end the process where the disk is full, with a signal and without a word.
    """
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)


class NpyArray:
    """One array in the `.npy` format, of which some rows are read at a time."""

    def __init__(self, place: Path, file: IO[bytes]) -> None:
        """Read the header.

        Args:
            place: What the array is called in messages.
            file: The open file.

        Raises:
            SourceError: It is none, holds objects, or lies in memory column by column.
        """
        self.place, self._file = place, file
        try:
            major, _ = npy.read_magic(file)
            header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
            self.shape, by_columns, self.dtype = header(file)
        except ValueError as error:
            raise unreadable(place, error, EXPECTED) from error
        self._data = file.tell()
        if self.dtype.hasobject:
            raise unreadable(place, "it holds Python objects", EXPECTED)
        if by_columns and len(self.shape) > 1:
            why = "it lies in memory column by column (save `ascontiguousarray`)"
            raise unreadable(place, why, EXPECTED)

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
            raise unreadable(self.place, f"it ends before row {stop - 1}", EXPECTED)
        values = np.frombuffer(content, dtype=self.dtype).reshape(shape)
        return values.astype(STRINGS) if self.dtype.kind == "U" else values


class NpyArrays(Arrays):
    """A `.npy` file, the `.npy` files of a folder by their names, or the arrays of a `.npz`."""

    def _open(self, path: Path, stack: ExitStack) -> None:
        if path.suffix == ".npz":
            self.files, opened = (path,), self._members(path, stack)
        else:
            self.files = sorted(path.rglob("*.npy")) if path.is_dir() else (path,)
            if not self.files or not all(file.is_file() for file in self.files):
                raise unreadable(path, "there is no .npy file", EXPECTED)
            folder = path if path.is_dir() else path.parent
            opened = {
                file.relative_to(folder).as_posix(): stack.enter_context(file.open("rb"))
                for file in self.files
            }
        for name, file in opened.items():
            array = NpyArray(path if path.name == name else path / name, file)
            self._add(name, array.shape, array.read)

    def _members(self, path: Path, stack: ExitStack) -> dict[str, IO[bytes]]:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
        except (OSError, zipfile.BadZipFile) as error:
            raise unreadable(path, error, EXPECTED) from error
        return {
            name.removesuffix(".npy"): stack.enter_context(archive.open(name))
            for name in archive.namelist()
        }


read = NpyArrays
