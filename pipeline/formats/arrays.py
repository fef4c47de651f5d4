"""Files of other people: arrays by name, read some rows at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from features.errors import SourceError
from pipeline.formats.rows import STRINGS, Block, Layout, encoder_of

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
