"""Captions from tables of their own, joined to the samples of a source: recaptions."""

import itertools
import json
import logging
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, model_validator

from features.config import DataPattern
from features.errors import SourceError
from features.sources.base import OF_LATER, Counts, Known, Sample, SourceReader, SourceSettings
from features.sources.captions import CaptionPicker, as_text
from features.sources.tables import table_rows, table_suffix
from features.sources.text import NUMBER, Encoding
from features.storage.files import is_file, matching_places
from features.storage.place import Place, as_place

logger = logging.getLogger(__name__)
TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})
"""Suffixes by which `captions` names a table; `.txt` and `.json` are members of a sample too."""
ALL_OF_THE_TABLE = "*"
IDS = frozenset(
    {"id", "key", "uid", "url", "imageurl", "imgurl", "image", "imageid", "imagename", "imagefile"}
    | {"imagepath", "img", "imgpath", "imgid", "imgname", "file", "filename", "filepath", "path"}
    | {"photoid", "sampleid", "samplekey"}
)
"""What columns are called that say whose captions a row has, in letters alone."""
URL = re.compile(r"\w+://\S*", re.ASCII)
PRAGMAS = "PRAGMA cache_size = -65536; PRAGMA temp_store = FILE; PRAGMA journal_mode = OFF"
NAMES_SHOWN = 3
NAME_SHOWN = 80


class JoinableSettings(SourceSettings):
    """What sources have whose samples may get captions from a table."""

    table: DataPattern | tuple[DataPattern, ...] | None = Field(
        default=None, json_schema_extra=OF_LATER
    )
    """Table or tables (`.csv`, `.tsv`, `.jsonl`, `.parquet`, each also a pattern) of further
    captions, joined to the samples by `join`. Their columns are the caption fields: those named in
    `captions`, or all of text beside the captions of the source itself. `captions = "TABLE.csv"`
    takes all columns of text, and no captions of the source itself."""
    join: str | None = Field(default=None, json_schema_extra=OF_LATER)
    """Column of `table` that says whose captions a row has: the value of that name in the sample's
    `.json`, the `url` there, or its key or file name. Where it is not given, the one column that is
    called like that (`url`, `key`, `Image Path`, `filename`, …)."""
    encoding: Encoding | None = Field(default=None, json_schema_extra=OF_LATER)
    """Encoding of tables and texts that have no byte order mark, such as `cp1252` of Excel's plain
    CSV or `gb18030`; UTF-8 if not given."""

    @model_validator(mode="before")
    @classmethod
    def _captions_may_be_a_table(cls, settings: Any) -> Any:
        given = settings.get("captions") if isinstance(settings, dict) else None
        names = [given] if isinstance(given, str) else list(given or ())
        tables = [each for each in names if isinstance(each, str) and _is_table(each)]
        if not tables:
            return settings
        if len(tables) < len(names) or settings.get("table") is not None:
            raise ValueError(
                f"`captions` names the table {tables[0]!r} beside others; name tables in `table`, "
                f"and columns in `captions`"
            )
        return settings | {"captions": [ALL_OF_THE_TABLE], "table": tables}

    @model_validator(mode="after")
    def _join_is_of_a_table(self) -> "JoinableSettings":
        if self.table is None and (self.join or ALL_OF_THE_TABLE in self.captions):
            name = "join" if self.join else f'captions = "{ALL_OF_THE_TABLE}"'
            raise ValueError(f"`{name}` has no effect without `table`; give one, or take it out")
        return self

    @property
    def expected_fields(self) -> tuple[str, ...]:
        """Caption fields that the settings name; empty where the data decide."""
        return () if ALL_OF_THE_TABLE in self.captions else self.captions

    def summary(self) -> str:
        """Say in words what is there.

        Raises:
            SourceError: Nothing is.
        """
        names = ", ".join(place.name for place in self.tables())
        return super().summary() + (names and f", captions in {names}")

    def tables(self) -> tuple[Place, ...]:
        """Return the tables, in their order.

        Raises:
            SourceError: One is not there, or it is not clear what says whose captions a row has.
        """
        patterns = [self.table] if isinstance(self.table, str) else self.table or ()
        try:
            found: dict[Place, None] = {}
            for pattern in patterns:
                place = as_place(pattern)
                found |= dict.fromkeys([place] if is_file(place) else matching_places(pattern))
        except FileNotFoundError as error:
            raise SourceError(
                f"There is no table {error}. A table of captions was expected. Correct `table` (or "
                f"`captions`) of the source; it is relative to the run file."
            ) from error
        for place in found:
            _first_row(place, self)
        return tuple(found)


Joinable = TypeVar("Joinable", bound=JoinableSettings)


class JoiningReader(SourceReader[Joinable]):
    """A reader whose samples get the captions of a table, where the settings name one."""

    def __init__(self, source: Joinable, found: Iterable[Place], known: Known) -> None:
        super().__init__(source, found, known)
        self._tables = source.tables()

    @property
    def files_beside(self) -> tuple[Place, ...]:
        """The tables of further captions."""
        return self._tables

    @cached_property
    def joined(self) -> "JoinedTables | None":
        """The tables, read when the first sample wants its captions."""
        return JoinedTables(self._tables, self.source) if self._tables else None

    @property
    def known_fields(self) -> Collection[str]:
        """The fields of the tables, so that samples without a row come first at no cost."""
        return self.joined.fields if self.joined else ()

    def join(self, sample: Sample, ids: Iterable[object], counts: Counts) -> None:
        """Give a sample the captions of the table, found by the first of its names that is there.

        Args:
            sample: It keeps its own captions, but for fields of the same names.
            ids: What it may be called in the table, beside its key; what is None is none.
            counts: Those of the pass over all samples.
        """
        if self.joined is not None:
            name = sample.key.partition("/")[2]
            every = (*ids, sample.key, name, name.rpartition("/")[2])
            self.joined.give(sample, every, counts)

    def check(self) -> None:
        """Refuse a name of captions that no sample had, or a table that is of none of them."""
        if self.joined is not None:
            if self.source.rows is None:
                self.joined.check(self.place)
            self.picker.see(sorted(self.joined.fields))
            self.picker.see_captions([ALL_OF_THE_TABLE, *self.joined.found])
        super().check()

    def leftover(self) -> Counts:
        """Count the samples without a row, and the rows that are of no sample."""
        return self.joined.leftover() if self.joined else Counts()


class JoinedTables:
    """Tables of captions, kept on disk and found by a hash of the id.

    The rows lie in a database that SQLite makes in `TMPDIR` and removes with the process. Its cache
    of 64 MiB and a byte a row are in memory.

    Args:
        places: The tables.
        source: Says by which column they are joined, and which are captions.

    Raises:
        SourceError: One cannot be read, or lacks a column.
    """

    def __init__(self, places: Sequence[Place], source: JoinableSettings) -> None:
        self.names = ", ".join(place.name for place in places)
        self.columns: tuple[str, ...] = ()
        """Of the ids, one of each table."""
        self._source = source
        self._read_counts = Counts()
        self._pickers: dict[tuple[str, ...], CaptionPicker | None] = {}
        self._fields: dict[str, bool] = {}
        """Whether a field has anything but numbers and URLs, which are no captions."""
        logger.info("the captions of %s are read", self.names)
        try:
            # One thread at a time lists samples, though not always the one that began.
            self._rows = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            self._rows.executescript(PRAGMAS)
            self._rows.execute("CREATE TABLE rows (id TEXT, hash INTEGER, captions TEXT)")
            self._rows.execute("BEGIN")
            for place in places:
                self._rows.executemany("INSERT INTO rows VALUES (?, ?, ?)", self._read(place))
            self._rows.execute("CREATE INDEX hashes ON rows (hash)")
            self._rows.execute("COMMIT")
            total = self._rows.execute("SELECT MAX(rowid) FROM rows").fetchone()[0]
        except sqlite3.Error as error:
            raise _not_kept(self.names, error) from error
        self.fields = frozenset(name for name, is_text in self._fields.items() if is_text)
        if not self.fields:
            raise SourceError(
                f"{self.names} holds no captions: its columns of text are "
                f"{list(self._fields)}. Correct `captions` and `join` of the source."
            )
        self._uses = np.zeros((total or 0) + 1, dtype=np.uint8)
        self._tried: list[str] = []
        """What the first sample without a row may be called."""
        self._start(Counts())

    @property
    def found(self) -> set[str]:
        """Names of columns and fields that captions were found under."""
        pickers = filter(None, self._pickers.values())
        return set(self.fields).union(*(picker.found for picker in pickers))

    def give(self, sample: Sample, ids: Sequence[object], counts: Counts) -> None:
        """Give a sample its captions; a pass over all samples has counts of its own."""
        if counts is not self._counts:
            self._start(counts)
        found = next(filter(None, map(self._find, ids)), None)
        if found is None:
            self._without += 1
            self._tried = self._tried or list(dict.fromkeys(filter(None, map(_as_id, ids))))
            if len(self._first_without) < NAMES_SHOWN:
                self._first_without.append(sample.key)
            return
        row, captions = found
        if self._uses[row] == 1:
            counts[f"rows of {self.names} that are of several samples (each has the captions)"] += 1
        self._uses[row] = min(self._uses[row], 1) + 1
        texts = {name: text for name, text in json.loads(captions).items() if name in self.fields}
        if sample.captions.keys() & texts:
            counts[f"captions that those of {self.names} under the same name replace"] += 1
        sample.captions |= texts

    def check(self, place: str) -> None:
        """Refuse tables that have a row for none of the samples.

        Raises:
            SourceError: With names of both, which tell how they differ.
        """
        if self._without and not self._uses.any():
            ids = [name for (name,) in self._rows.execute("SELECT id FROM rows LIMIT 2")]
            raise SourceError(
                f"{self.names} has captions for no sample of {place}: its {self.columns[0]!r} is "
                f"{_listed(ids, ', …')}, and a sample is {_listed(self._tried, '')}. The "
                f"`url` of the samples' .json, or their keys or file names were expected there. "
                f"Correct `join` or `table` of the source."
            )

    def leftover(self) -> Counts:
        """Count samples without a row and rows without a sample, and name the first of them."""
        once = "SELECT COUNT(*) FROM (SELECT 1 FROM rows GROUP BY hash)"
        distinct = self._rows.execute(once).fetchone()[0]
        total = len(self._uses) - 1
        unused = distinct - int(np.count_nonzero(self._uses))
        more = "SELECT MIN(rowid) FROM rows GROUP BY hash HAVING COUNT(*) > 1 LIMIT ?"
        repeated = [row for (row,) in self._rows.execute(more, (NAMES_SHOWN,))]
        counts = Counts(self._read_counts)
        for what, count, names in (
            (f"samples without a row in {self.names}", self._without, self._first_without),
            (f"rows of {self.names} that are of no sample", unused, self._first_unused(unused)),
            (
                f"rows of {self.names} whose id came before (ignored)",
                total - distinct,
                map(self._id_of, repeated),
            ),
        ):
            if count:
                shown = list(names)
                counts[f"{what}: {_listed(shown, ', …' * (count > len(shown)))}"] = count
        return counts

    def _start(self, counts: Counts) -> None:
        self._counts = counts
        self._uses[:] = 0
        self._without = 0
        self._first_without: list[str] = []
        self._tried = []

    def _read(self, place: Place) -> Iterator[tuple[str, int, str]]:
        column = _first_row(place, self._source)
        self.columns = tuple(dict.fromkeys((*self.columns, column)))
        for row in table_rows(place, self._source.encoding):
            name = _as_id(row.get(column))
            if not name:
                self._read_counts[f"rows of {place.name} without {column!r} (ignored)"] += 1
                continue
            captions = self._captions_in(row, column, place)
            for field, text in captions.items():
                if not self._fields.get(field):
                    self._fields[field] = not (NUMBER.fullmatch(text) or URL.fullmatch(text))
            yield name, hash(name), json.dumps(captions, ensure_ascii=False)

    def _captions_in(self, row: Mapping[str, Any], column: str, place: Place) -> dict[str, str]:
        columns = tuple(row)
        if columns not in self._pickers:
            wanted = _caption_columns(columns, column, self._source.captions)
            self._pickers[columns] = CaptionPicker(wanted, str(place)) if wanted else None
        picker = self._pickers[columns]
        if picker is None:
            return {}
        there = {name: row[name] for name in picker.names if _may_be_text(row[name])}
        texts = picker.pick(there, self._read_counts)
        return {name: stripped for name, text in texts.items() if (stripped := text.strip())}

    def _find(self, name: object) -> tuple[int, str] | None:
        wanted = _as_id(name)
        if not wanted:
            return None
        query = "SELECT rowid, captions FROM rows WHERE hash = ? AND id = ? ORDER BY rowid LIMIT 1"
        found: tuple[int, str] | None = self._rows.execute(query, (hash(wanted), wanted)).fetchone()
        return found

    def _first_unused(self, count: int) -> Iterator[str]:
        rows = np.flatnonzero(self._uses[1:] == 0) + 1 if count else ()
        firsts = (
            name
            for row in map(int, rows)
            if (found := self._find(name := self._id_of(row))) and found[0] == row
        )
        return itertools.islice(firsts, NAMES_SHOWN)

    def _id_of(self, row: int) -> str:
        return str(self._rows.execute("SELECT id FROM rows WHERE rowid = ?", (row,)).fetchone()[0])


def _first_row(place: Place, source: JoinableSettings) -> str:
    """Return the column of a table that says whose captions a row has, by its first row."""
    first = next(table_rows(place, source.encoding), None)
    if first is None:
        raise SourceError(
            f"The table {place} has no rows. Captions were expected. Correct `table` (or "
            f"`captions`) of the source."
        )
    there = [str(name) for name in first]
    alike = [name for name in there if _letters(name) in IDS]
    if source.join is None and len(alike) != 1:
        several = f" ({', '.join(alike)} may)" if alike else ""
        raise SourceError(
            f"The table {place} has the columns {there[:20]}, and it is not clear which says whose "
            f"captions a row has{several}. Set "
            f"`join` of the source to the column of URLs, keys or file names."
        )
    column = source.join or alike[0]
    if column not in there or not _caption_columns(there, column, ()):
        raise SourceError(
            f"The table {place} has the columns {there[:20]}. {column!r}, which says whose "
            f"captions a row has, and columns of captions were expected. Correct `join` and "
            f"`captions` of the source."
        )
    return column


def _caption_columns(there: Sequence[str], column: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the wanted columns; all that are not called like an id where none of them is there."""
    named = tuple(name for name in wanted if name in there)
    return named or tuple(
        name for name in there if name and name != column and _letters(name) not in IDS
    )


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _is_table(name: str) -> bool:
    place = as_place(name)
    return bool(PurePosixPath(name).stem) and table_suffix(place) in TABLES


def _may_be_text(value: Any) -> bool:
    return isinstance(value, str | list | tuple | dict)


def _as_id(value: object) -> str:
    return "" if value is None else as_text(str(value).strip())


def _listed(names: Iterable[str], more: str) -> str:
    return ", ".join(f"{name!r:.{NAME_SHOWN}}" for name in names) + more


def _not_kept(names: str, error: sqlite3.Error) -> SourceError:
    return SourceError(
        f"The captions of {names} cannot be kept on disk while they are joined: {error}. Room for "
        f"a copy of the table was expected in the folder of temporary files. Set TMPDIR to one "
        f"that has it."
    )
