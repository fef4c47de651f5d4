"""Files of other people: arrays by name, read some rows at a time."""

import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import SourceError
from features.sources.tables import table_rows
from features.storage.column import encoder_of
from features.storage.reading import MAX_TEXT_BYTES, Expected, cut_text, reading
from pipeline.stores.blocks import STRINGS, Block, Layout

logger = logging.getLogger(__name__)
TABLE_ROWS = 4096
Reader = Callable[[int, int], np.ndarray]
"""Returns the rows from one to another, the latter not included."""
TYPES: Mapping[str, tuple[str, Any]] = {
    "features": ("f", np.float16),
    "status": ("u", np.uint8),
    "label": ("i", np.int32),
    "group": ("i", np.int32),
}
"""Kind of the values of a store's arrays, and their type; all others are texts."""


class Arrays(AbstractContextManager["Arrays"]):
    """Arrays in a file or folder, by name. Texts come as numpy's variable-width strings."""

    expected: Expected
    """What such files are called in messages."""
    layout: Layout | None = None
    """Of the store that `sail convert` wrote in this form; None for files of other programs."""
    files: Sequence[Path] = ()
    """Files that they are read from."""
    usual: Mapping[str, str] = {}
    """What is taken unless something else is asked for: names in a store, and names here."""

    def __init__(self, path: Path) -> None:
        """Open files and read what describes them.

        Raises:
            SourceError: They are not of this form.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape by name; the first number is that of the rows."""
        self._readers: dict[str, Reader] = {}
        self.path = path
        with ExitStack() as stack, reading(path, self.expected):
            self._open(path, stack)
            self._close = stack.pop_all().close

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of an array.

        Raises:
            SourceError: They are damaged, or not of one length.
        """
        with reading(self.path, self.expected):
            values = self._readers[name](start, stop)
        return limited(values, f"{name} of {self.path}") if values.dtype == STRINGS else values

    @abstractmethod
    def _open(self, path: Path, stack: ExitStack) -> None:
        """Set `files`, and `layout` or `usual`, and add the arrays.

        What is entered into the stack is closed with the arrays, or at once after an error.
        """

    def _add(self, name: str, shape: tuple[int, ...], read: Reader) -> None:
        self.shapes[name], self._readers[name] = shape, read


class WrittenRows:
    """The rows of a store that `sail convert` wrote in another form."""

    def __init__(self, path: Path, arrays: Arrays, layout: Layout) -> None:
        self.layout, self.stamp = layout, stamp_of(arrays)
        self._path, self._arrays = path, arrays
        self.block(0, 1)  # before anything is made of what is not there

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`; refuse values of other types than a store has."""
        return {name: self._read(name, start, stop) for name in self.layout.array_names}

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self._arrays.read(name, start, stop)
        array = name.rpartition("/")[2] if encoder_of(name) in self.layout.fingerprints else name
        kind, dtype = TYPES.get(array, ("T", STRINGS))
        if values.dtype.kind != kind:
            expected = of_form("A store's arrays")
            raise expected.refusal(self._path, f"{name} holds {values.dtype}")
        return values.astype(dtype, copy=False)


class SequentialArray:
    """An array that comes in parts (files, row groups), read from its front to its back.

    Args:
        begin: Yields the parts from the first on.
    """

    def __init__(self, begin: Callable[[], Iterator[np.ndarray]]) -> None:
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


class WithTable(Arrays):
    """Arrays, and the columns of a `.csv`, `.tsv`, `.jsonl` or `.parquet` as `table/<column>`.

    Raises:
        SourceError: There is no such table, or it is empty.
    """

    def __init__(self, arrays: Arrays, table: Path) -> None:
        self._inner, self.expected = arrays, arrays.expected
        super().__init__(table)

    def _open(self, path: Path, stack: ExitStack) -> None:  # noqa: ARG002 - nothing stays open
        if not path.is_file():
            raise SourceError(
                f"There is no table {path}. A .csv, .tsv, .jsonl or .parquet file was expected. "
                f"Correct --table."
            )
        self.files, self.usual = (*self._inner.files, path), self._inner.usual
        for name, shape in self._inner.shapes.items():
            self._add(name, shape, partial(self._inner.read, name))
        rows = sum(1 for _ in table_rows(path))
        for column in next(iter(table_rows(path)), {}):
            texts = SequentialArray(partial(_texts, path, column))
            self._add(f"table/{column}", (rows,), texts.read)


def _texts(table: Path, column: str) -> Iterator[np.ndarray]:
    values = (row.get(column) for row in table_rows(table))
    texts = ("" if value is None else str(value) for value in values)
    while batch := list(itertools.islice(texts, TABLE_ROWS)):
        yield np.array(batch, dtype=STRINGS)


def stamp_of(arrays: Arrays) -> str:
    """Return name, size and time of the files of arrays."""
    each = [(str(file), file.stat()) for file in arrays.files]
    return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in each)


def limited(values: np.ndarray, place: str) -> np.ndarray:
    """Return texts, of which those over `MAX_TEXT_BYTES` are cut, and named in the log."""
    long = np.flatnonzero(np.strings.str_len(values) > MAX_TEXT_BYTES // 4)  # of 4 bytes at most
    texts = {row: cut_text(values[row]) for row in long.tolist()}
    if over := [row for row, text in texts.items() if text != values[row]]:
        logger.warning("%d texts over 1 MiB in %s are cut there", len(over), place)
        values = values.copy()
        for row in over:
            values[row] = texts[row]
    return values


def of_form(what: str) -> Expected:
    """Return how a form is called in messages."""
    remedy = "Correct the path or `--from`, or write the file again."
    return Expected(what, remedy, SourceError)
