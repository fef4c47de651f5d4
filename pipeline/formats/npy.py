"""NumPy files: `.npy`, folders of them, and `.npz`. Nothing is unpickled."""

import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.lib import format as npy

from features.errors import SourceError
from pipeline.formats.arrays import unreadable
from pipeline.formats.rows import STRINGS, Layout

EXPECTED = "NumPy arrays as `numpy.save` and `numpy.savez` write them"


class NpyArray(AbstractContextManager["NpyArray"]):
    """One array in the `.npy` format, of which some rows are read at a time."""

    def __init__(self, place: Path, begin: Callable[[], IO[bytes]]) -> None:
        """Read the header.

        Args:
            place: What the array is called in messages.
            begin: Opens the bytes.

        Raises:
            SourceError: It is none, holds objects, or lies in memory column by column.
        """
        self.place = place
        self._file = begin()
        try:
            major, _ = npy.read_magic(self._file)
            header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
            self.shape, by_columns, self.dtype = header(self._file)
            self._data = self._file.tell()
            if self.dtype.hasobject:
                raise unreadable(place, "it holds Python objects", EXPECTED)
            if by_columns and len(self.shape) > 1:
                raise unreadable(
                    place, "it lies in memory column by column (save `ascontiguousarray`)", EXPECTED
                )
        except ValueError as error:
            self._file.close()
            raise unreadable(place, error, EXPECTED) from error
        except SourceError:
            self._file.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._file.close()

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
        return np.frombuffer(content, dtype=self.dtype).reshape(shape)


class NpyArrays(AbstractContextManager["NpyArrays"]):
    """A `.npy` file, the `.npy` files of a folder by their names, or the arrays of a `.npz`."""

    layout: Layout | None = None
    usual: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        """Read the headers.

        Raises:
            SourceError: There is no such array, or one is not of this format.
        """
        with ExitStack() as stack:
            self._arrays = {
                name: stack.enter_context(
                    NpyArray(path if path.name == name else path / name, begin)
                )
                for name, begin in self._openers(path, stack).items()
            }
            self._stack = stack.pop_all()
        self.shapes = {name: array.shape for name, array in self._arrays.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of an array."""
        values = self._arrays[name].read(start, stop)
        return values.astype(STRINGS) if values.dtype.kind == "U" else values

    def _openers(self, path: Path, stack: ExitStack) -> dict[str, Callable[[], IO[bytes]]]:
        """Return what opens each array, by name."""
        if path.suffix == ".npz":
            return self._in_archive(path, stack)
        found = sorted(path.rglob("*.npy")) if path.is_dir() else [path]
        self.files = tuple(found)
        if not found or not all(file.is_file() for file in found):
            raise unreadable(path, "there is no .npy file", EXPECTED)
        names = [
            file.relative_to(path).as_posix() if path.is_dir() else file.name for file in found
        ]
        return {name: opener(file) for name, file in zip(names, found, strict=True)}

    def _in_archive(self, path: Path, stack: ExitStack) -> dict[str, Callable[[], IO[bytes]]]:
        self.files = (path,)
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
        except (OSError, zipfile.BadZipFile) as error:
            raise unreadable(path, error, EXPECTED) from error
        members = archive.namelist()
        return {name.removesuffix(".npy"): partial(archive.open, name) for name in members}


def opener(file: Path) -> Callable[[], IO[bytes]]:
    """Return what opens a file for reading."""
    return lambda: file.open("rb")
