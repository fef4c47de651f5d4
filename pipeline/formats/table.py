"""A table beside arrays, whose rows are theirs: captions, keys, labels."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from features.errors import SourceError
from features.sources.tables import table_rows
from pipeline.formats.arrays import Arrays, Stream
from pipeline.formats.rows import STRINGS, Layout

PREFIX = "table/"
ROWS_AT_ONCE = 4096


class WithTable:
    """Arrays, and the columns of a `.csv`, `.tsv`, `.jsonl` or `.parquet` as `table/<column>`."""

    layout: Layout | None = None

    def __init__(self, arrays: Arrays, table: Path) -> None:
        """Count the rows of the table.

        Raises:
            SourceError: There is no such table, or it is empty.
        """
        if not table.is_file():
            raise SourceError(
                f"There is no table {table}. A .csv, .tsv, .jsonl or .parquet file was expected. "
                f"Correct --table."
            )
        self._arrays, self._table = arrays, table
        columns = list(next(iter(table_rows(table)), {}))
        rows = sum(1 for _ in table_rows(table))
        self._streams = {f"{PREFIX}{name}": self._stream(name) for name in columns}
        self.files: Sequence[Path] = (*arrays.files, table)
        self.usual = arrays.usual
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **arrays.shapes,
            **dict.fromkeys(self._streams, (rows,)),
        }

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of an array or of a column of the table, as texts."""
        if name in self._streams:
            return self._streams[name].read(start, stop)
        return self._arrays.read(name, start, stop)

    def _stream(self, column: str) -> Stream:
        def parts() -> Iterator[np.ndarray]:
            values = (row.get(column) for row in table_rows(self._table))
            texts = ("" if value is None else str(value) for value in values)
            while batch := list(itertools.islice(texts, ROWS_AT_ONCE)):
                yield np.array(batch, dtype=STRINGS)

        return Stream(parts)
