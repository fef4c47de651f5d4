"""Columns of one encoder that one pass over the rows fills."""

from collections.abc import Iterable, Iterator, Sequence

from features.column import Column
from features.store import FeatureStore


class ColumnGroup:
    """Some columns of a store, of which a chunk counts as done when it is so in all."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = tuple(columns)

    @classmethod
    def open(cls, store: FeatureStore, names: Iterable[str]) -> "ColumnGroup":
        """Open columns by their names.

        Raises:
            StoreError: One is not there.
        """
        return cls([store.column(name) for name in names])

    def __iter__(self) -> Iterator[Column]:
        return iter(self._columns)

    @property
    def name(self) -> str:
        """The names of all."""
        return ", ".join(column.name for column in self._columns)

    @property
    def rows_per_chunk(self) -> int:
        """Rows of a chunk, the same in all columns of a store."""
        return self._columns[0].rows_per_chunk

    def chunk_rows(self, chunk: int) -> int:
        """Rows of the store in a chunk."""
        return self._columns[0].chunk_rows(chunk)

    def pending(self, among: Iterable[int] | None = None) -> list[int]:
        """Return the chunks that are not done in some column, in order; of some alone if given."""
        chunks = None if among is None else set(among)
        return sorted(set().union(*(column.pending(chunks) for column in self._columns)))

    def remove_leftovers(self) -> None:
        """Remove what killed writers left half-written; those at work are left alone."""
        for column in self._columns:
            column.remove_leftovers()
