"""Captions from a table of their own, joined to the samples of shards: recaptions, translations."""

import itertools
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import SourceError
from features.sources.base import Counts
from features.sources.captions import as_text
from features.sources.tables import table_rows
from features.sources.text import NUMBER
from features.storage.place import Place

ROWS_AT_ONCE = 1 << 16


class JoinedTable:
    """A table of captions in memory: its texts as Arrow holds them, found by a hash of the id.

    Args:
        place: The table.
        column: Column of the ids; the first if not given.
        names: Columns of the captions; all that hold text if not given.
        encoding: That of the table, where it has no byte order mark.

    Raises:
        SourceError: It cannot be read, or lacks a column.
    """

    def __init__(
        self, place: Place, column: str | None, names: Sequence[str], encoding: str | None
    ) -> None:
        self.place = place
        rows = table_rows(place, encoding)
        first = next(rows, None)
        if first is None:
            raise SourceError(
                f"The table {place} has no rows. Captions were expected. Correct `table` of the "
                f"source."
            )
        there = list(first)
        self.column = column or there[0]
        fields = [name for name in names if name in there] or there
        self.fields = [name for name in fields if name and name != self.column]
        if self.column not in there or not self.fields:
            raise SourceError(
                f"The table {place} has the columns {there[:20]}. {self.column!r}, which says "
                f"whose captions a row has, and columns of captions were expected. Correct `join` "
                f"and `captions` of the source."
            )
        hashes, parts = array("q"), []
        every = itertools.chain([first], rows)
        while some := list(itertools.islice(every, ROWS_AT_ONCE)):
            ids = [_as_id(row.get(self.column)) for row in some]
            hashes.extend(map(hash, ids))
            texts = {name: [_as_caption(row.get(name)) for row in some] for name in self.fields}
            parts.append(pa.table({"id": ids} | {f"/{name}": texts[name] for name in texts}))
        self._table = pa.concat_tables(parts)
        self._drop_numbers()
        every_hash = np.frombuffer(hashes, dtype=np.int64)
        self._order = np.argsort(every_hash, kind="stable")
        self._hashes = every_hash[self._order]
        self._is_used = np.zeros(len(every_hash), dtype=bool)

    def _drop_numbers(self) -> None:
        """Leave out columns that hold numbers, as similarities: they are no captions."""
        for name in list(self.fields):
            texts = (text.as_py() for text in self._table[f"/{name}"])
            if all(NUMBER.fullmatch(text) for text in texts if text):
                self.fields.remove(name)

    def captions_of(self, ids: Iterable[object]) -> dict[str, str] | None:
        """Return the captions of the first id that has a row, None where none has."""
        for each in map(_as_id, ids):
            if not each:
                continue
            value = hash(each)
            start = int(np.searchsorted(self._hashes, value))
            while start < len(self._hashes) and self._hashes[start] == value:
                row = int(self._order[start])
                if self._table["id"][row].as_py() == each:
                    self._is_used[row] = True
                    texts = {name: self._table[f"/{name}"][row].as_py() for name in self.fields}
                    return {name: as_text(text) for name, text in texts.items() if text}
                start += 1
        return None

    def unused(self) -> Counts:
        """Count the rows that were no sample's, and those whose id came before."""
        ids = self._table["id"].filter(pa.array(~self._is_used))
        used = self._table["id"].filter(pa.array(self._is_used))
        is_repeated = pc.is_in(ids, value_set=used.combine_chunks())
        repeated = int(pc.sum(is_repeated).as_py() or 0)
        name = self.place.name
        return Counts(
            {
                f"rows of {name} that are of no sample": len(ids) - repeated,
                f"rows of {name} whose {self.column} came before (ignored)": repeated,
            }
        )


def _as_id(value: object) -> str:
    return "" if value is None else as_text(str(value).strip())


def _as_caption(value: object) -> str:
    return as_text(value.strip()) if isinstance(value, str) else ""
