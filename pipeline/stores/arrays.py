"""Files of other people: arrays by name, read some rows at a time."""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open

from features.errors import SourceError
from pipeline.stores.blocks import STRINGS, Block, Layout, encoder_of

TYPES: Mapping[str, tuple[str, Any]] = {
    "features": ("f", np.float16),
    "status": ("u", np.uint8),
    "label": ("i", np.int32),
    "group": ("i", np.int32),
}
"""Kind of the values of a store's arrays, and their type; all others are texts."""


class Arrays(Protocol):
    """Arrays in a file or folder, by name. Texts come as numpy's variable-width strings."""

    @property
    def layout(self) -> Layout | None:
        """Of the store that `sail convert` wrote in this form; None for files of other programs."""

    @property
    def files(self) -> Sequence[Path]:
        """Files that they are read from."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name; the first number is that of the rows."""

    @property
    def usual(self) -> Mapping[str, str]:
        """What is taken unless something else is asked for: names in a store, and names here."""

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of an array."""


class WrittenRows:
    """The rows of a store that `sail convert` wrote in another form."""

    def __init__(self, path: Path, arrays: Arrays, layout: Layout) -> None:
        self.layout, self.stamp = layout, stamp_of(arrays)
        self._path, self._arrays = path, arrays

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`.

        Raises:
            SourceError: Their values are of another type than those of a store.
        """
        return {name: self._read(name, start, stop) for name in self.layout.array_names}

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self._arrays.read(name, start, stop)
        array = name.rpartition("/")[2] if encoder_of(name) in self.layout.fingerprints else name
        kind, dtype = TYPES.get(array, ("T", STRINGS))
        if values.dtype.kind != kind:
            raise unreadable(self._path, f"{name} holds {values.dtype}", "A store's arrays")
        return values.astype(dtype, copy=False)


class Stream:
    """An array that comes in parts (files, row groups), read from its front to its back."""

    def __init__(self, begin: Callable[[], Iterator[np.ndarray]]) -> None:
        """Know where it begins.

        Args:
            begin: Yields the parts from the first on.
        """
        self._begin = begin
        self._parts: Iterator[np.ndarray] = iter(())
        self._first, self._part = 0, np.empty(0)
        self._has_begun = False

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop`, which the array must have."""
        if not self._has_begun or start < self._first:
            self._parts, self._has_begun = self._begin(), True
            self._first, self._part = 0, next(self._parts)
        pieces = []
        while True:
            end = self._first + len(self._part)
            if start < end:
                pieces.append(self._part[start - self._first : stop - self._first])
                start = min(stop, end)
            if start == stop:
                break
            self._part = next(self._parts)
            self._first = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def stamp_of(arrays: Arrays) -> str:
    """Return name, size and time of the files of arrays."""
    each = [(str(file), file.stat()) for file in arrays.files]
    return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in each)


def unreadable(path: Path, why: object, expected: str) -> SourceError:
    """Return the error of a file that is not what it was taken for."""
    return SourceError(
        f"{path} cannot be read: {why}. {expected} was expected. Correct the path or `--from`, or "
        f"write the file again."
    )


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


class SafetensorsArrays(AbstractContextManager["SafetensorsArrays"]):
    """The tensors of a file. bfloat16 comes as float32, which has room for all of it."""

    layout: Layout | None = None
    usual: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            SourceError: It is none.
        """
        self.files = (path,)
        try:
            self._file = cast(Any, safe_open)(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error, "A safetensors file") from error
        self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - it is no dictionary
        self.shapes = {name: tuple(part.get_shape()) for name, part in self._slices.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of a tensor."""
        rows: torch.Tensor = self._slices[name][start:stop]
        return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
