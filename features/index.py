"""The index: one parquet file per split that gives every sample a row before anything is encoded.

So the number of rows is known, work can be cut into chunk-aligned units, and images are read by
place. Columns: `key`, `path`, `offset`, `size`, `problem`, `label`, `group`, `caption/<field>`, and
`box` where samples are parts of images; see `features.sources.Sample`. The metadata of the
file hold the source's settings, its files with size and time, and counts of everything that was
handled by rule.
"""

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.config import ExtractConfig
from features.errors import SourceError
from features.sources import SOURCES, Sample
from features.sources.index_writer import (
    BOX,
    COLUMNS,
    METADATA_KEY,
    NEVER_READ,
    ROWS_PER_GROUP,
    VERSION,
    Reader,
    write_index,
)
from features.sources.survey import Earlier
from features.storage.files import partial_path
from features.storage.parallel import in_order
from features.storage.place import Place, as_place
from features.storage.reading import Expected, check_regular, reading
from features.storage.versions import state_elsewhere, state_of

Images = Sequence[bytes | None]
EXPECTED = Expected(
    "An index of this version", "Delete it, and run `sail extract` again.", SourceError
)


def build_index(
    reader: Reader,
    path: Path,
    *,
    needs_images: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> "Index":
    """List every sample of a source, and write the index: all of it, or nothing.

    Args:
        reader: What lists the samples.
        path: Where the index goes.
        needs_images: Whether it is refused where not one sample has an image.
        on_progress: Called now and then with the number of samples since the last call.

    Raises:
        SourceError: The source cannot be read, or holds no samples.
    """
    write_index(reader, path, on_progress, needs_images=needs_images)
    return Index.open(path)


GROUPS_KEPT = 4
MAX_PIXELS = ExtractConfig().max_pixels


class Index:
    """An index on disk; any number of threads may share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pq.ParquetFile(path, page_checksum_verification=True)
        self._lock = threading.Lock()
        self._cached_group = lru_cache(GROUPS_KEPT)(self._read_group)
        about = json.loads(self._file.metadata.metadata[METADATA_KEY])
        if about["version"] != VERSION:
            raise ValueError(f"it has version {about['version']}, this program reads {VERSION}")
        self.rows: int = self._file.metadata.num_rows
        self.fields: tuple[str, ...] = tuple(about["fields"])
        self.class_names: tuple[str, ...] | None = (
            tuple(about["class_names"]) if about["class_names"] else None
        )
        self.has_boxes = "box" in self._file.schema_arrow.names
        self.columns: tuple[str, ...] = (*COLUMNS, *(BOX if self.has_boxes else ()))
        """All but the captions."""
        self.has_labels: bool = about["has_labels"]
        self.has_groups: bool = about["has_groups"]
        self.counts: dict[str, int] = about["counts"]
        """How many members, samples and captions were handled by which rule."""
        self.source: dict[str, Any] = about["source"]
        self.shards: dict[Place, dict[str, Any]] = {
            as_place(shard["path"]): shard for shard in about["shards"]
        }
        """Files (or folders) in the order of their rows: `name`, and `size_and_time` as indexed."""
        self.grown_from: tuple[int, ...] = tuple(about["grown_from"])
        """Rows there were before each time that rows were appended."""
        self._about = about
        unreadable = about.get("unreadable", {})
        self.unreadable: dict[Place, dict[str, Any]] = {
            as_place(path): found for path, found in unreadable.items()
        }
        """Shards that could not be read, of which nothing was used."""
        self.beside: dict[str, dict[str, Any]] = about.get("beside", {})
        """Further files that the samples are made of, as they were."""

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Open an index.

        Raises:
            SourceError: It is missing, damaged, or was not written by this program.
        """
        with reading(path, EXPECTED):
            return cls(check_regular(path))

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups by their numbers, where the data name them."""
        return tuple(self._about.get("group_names", ()))

    @property
    def seen(self) -> tuple[str, ...]:
        """What the records have, where none of it is a caption."""
        return tuple(self._about.get("seen", ()))

    @property
    def names(self) -> dict[Place, str]:
        """Files in the order of their rows, with what their keys begin with."""
        return {path: str(shard["name"]) for path, shard in self.shards.items()}

    def as_earlier(self) -> Earlier:
        """Return what an index that takes the place of this one must keep."""
        return Earlier(
            place=str(self.path),
            rows=self.rows,
            samples=self.samples,
            shards=self.shards,
            counts=self.counts,
            grown_from=self.grown_from,
            class_names=self.class_names if self.has_labels else None,
            has_labels=self.has_labels,
            group_names=self.group_names,
            has_groups=self.has_groups,
        )

    def samples(self) -> Iterator[Sample]:
        """Yield all rows as they were listed."""
        for table in self.batches(ROWS_PER_GROUP):
            for row in table.to_pylist():
                captions = {field: row.pop(f"caption/{field}") for field in self.fields}
                yield Sample(**row, captions=captions)

    @property
    def row_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that a store of these rows has: `key`, `caption/<field>`, ..."""
        numbers = (("label", self.has_labels), ("group", self.has_groups))
        captions = (f"caption/{field}" for field in self.fields)
        return ("key", *captions, *(name for name, is_there in numbers if is_there))

    def blocks(
        self, names: Sequence[str], rows: int, *, first: int = 0
    ) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of such arrays by name, from row `first` on, so many rows at once."""
        for table in self.batches(rows, tuple(names), first=first):
            yield {name: table.column(name).to_pylist() for name in names}

    def batches(
        self, rows: int, columns: tuple[str, ...] | None = None, *, first: int = 0
    ) -> Iterator[pa.Table]:
        """Yield tables of `rows` rows, from one on, the last shorter; keep nothing afterwards."""
        for start in range(first, self.rows, rows):
            yield self.rows_between(start, min(start + rows, self.rows), columns)
        with self._lock:
            self._cached_group.cache_clear()

    def rows_between(
        self, start: int, stop: int, columns: tuple[str, ...] | None = None
    ) -> pa.Table:
        """Return rows `start` to `stop` without reading the rest of the file.

        Args:
            start: First row.
            stop: Row behind the last.
            columns: Names of the columns to read; all if not given.
        """
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of an index of {self.rows} rows")
        first = min(start, self.rows - 1) // ROWS_PER_GROUP
        last = max(first + 1, -(-stop // ROWS_PER_GROUP))
        tables = [self._group(number, columns) for number in range(first, last)]
        return pa.concat_tables(tables).slice(start - first * ROWS_PER_GROUP, stop - start)

    def _group(self, number: int, columns: tuple[str, ...] | None) -> pa.Table:
        with self._lock:
            return self._cached_group(number, columns)

    def _read_group(self, number: int, columns: tuple[str, ...] | None) -> pa.Table:
        wanted = None if columns is None else list(columns)
        with reading(self.path, EXPECTED):
            return self._file.read_row_group(number, columns=wanted)


class SampleReader:
    """Reads the image bytes of rows, by place; any number of threads may share one.

    Args:
        index: Says where they are.
        max_pixels: No box is cut out of a larger image: it is returned whole, for the decoder to
            refuse.
    """

    def __init__(self, index: Index, *, max_pixels: int = MAX_PIXELS) -> None:
        self.index = index
        self._max_pixels = max_pixels
        source = index.source
        with reading(index.path, EXPECTED):
            self._images = SOURCES[source["kind"]].model_validate(source).image_reader()

    def read(self, start: int, stop: int) -> list[bytes | None]:
        """Return the encoded image of each row, None where the index has none.

        Each file is opened once, and read from its front to its back; under a URL, near images
        come with one request, and image files many at once.

        Raises:
            SourceError: A file is missing or shorter than it was when it was indexed.
        """
        table = self.index.rows_between(start, stop, ("path", "offset", "size", "problem"))
        images: list[bytes | None] = [None] * table.num_rows
        listed = enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True))
        there = (
            (path, row, (offset, size))
            for row, (path, offset, size, problem) in listed
            if offset >= 0 and problem not in NEVER_READ
        )
        groups = itertools.groupby(there, key=itemgetter(0))
        jobs = [(path, list(group)) for path, group in groups]
        parts = in_order(self._read, jobs, at=[as_place(path) for path, _ in jobs])
        for (_, group), found in zip(jobs, parts, strict=True):
            for (_, row, _), image in zip(group, found, strict=True):
                images[row] = image
        return self._parts(images, start) if self.index.has_boxes else images

    def _read(self, job: tuple[str, list[tuple[str, int, tuple[int, int]]]]) -> Images:
        path, group = job
        return self._images.read(path, [place for _, _, place in group])

    def read_row(self, row: int) -> bytes | None:
        """Return the encoded image of one row, None where the index has none."""
        return self.read(row, row + 1)[0]

    def _parts(self, images: Sequence[bytes | None], start: int) -> list[bytes | None]:
        """Cut the box of each row out of its image."""
        from features.images import cut_out  # torch comes with it, and is mostly not needed

        boxes = self.index.rows_between(start, start + len(images), ("box",)).column("box")
        return [
            cut_out(image, box, max_pixels=self._max_pixels) if image and box else image
            for image, box in zip(images, boxes.to_pylist(), strict=True)
        ]


MAY_DIFFER = {"captions", "path", "rows"}
PLACES = {"class_names", "names", "images", "table"}
"""Settings that may name the same file elsewhere; what follows from it is compared."""
SHOWN = 80
START_AGAIN = "Give this run another `run.dir`, or delete the index and the store to start again."

ONLY_MOVED = (
    "If the same files lie elsewhere now, delete the index alone: it is written again, and the "
    "features stay."
)


@dataclass(frozen=True)
class Changes:
    """How a source differs from its index."""

    settings: frozenset[str]
    """Settings that differ: which captions are picked, where the files are, how many rows."""
    tables: tuple[Place, ...]
    """Tables of captions that were written anew, and files that may have been copied."""
    files: tuple[Place, ...]
    """Shards, or folders of a class, that were not there."""
    moved_to: Reader | None = None
    """The source, where all of its files lie elsewhere now."""

    def __bool__(self) -> bool:
        return bool(self.settings or self.tables or self.files or self.moved_to)


def find_changes(index: Index, reader: Reader) -> Changes:
    """Compare a source with what was indexed, without reading its samples.

    Raises:
        SourceError: A file changed or is gone, or the settings are those of other rows.
    """
    settings = _changed_settings(index, reader)
    if (moved := _moved(index, reader)) is not None:
        return Changes(settings, (), (), moved)
    return Changes(
        settings, tables=_changed_tables(index, reader), files=_added_files(index, reader)
    )


def update_index(
    index: Index,
    reader: Reader,
    changes: Changes,
    *,
    append: bool,
    into: Path | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Index:
    """Bring an index up to date. It is replaced as a whole: a kill leaves the old or the new one.

    Shards that were indexed are read again only if their captions are picked otherwise.

    Args:
        index: What was indexed earlier.
        reader: The source as it is now, opened with the files that the index knows.
        changes: What `find_changes` found between these two.
        append: Whether there may be more rows: those of further shards, or at the end of a table.
        into: Where the new index is written; it takes the place of the old one if not given.
        on_progress: Called now and then with the number of samples since the last call.

    Raises:
        SourceError: Rows would change or go, or there are more and `append` is not set.
    """
    if changes.files and not append:
        raise SourceError(
            f"Files match {reader.place} that were not there when it was indexed in "
            f"{index.path}: {len(changes.files)}, of which {changes.files[0]} is the first. "
            f"{_NOT_WITHOUT_APPEND}"
        )
    candidate, moved = partial_path(index.path), changes.moved_to is not None
    reader = changes.moved_to or reader
    of_others = reader.files_beside or reader.source.rows  # what is not in the files alone
    is_same = not (moved or changes.tables or changes.settings - {"path"} or of_others)
    try:
        write_index(reader, candidate, on_progress, before=index.as_earlier(), is_copied=is_same)
        _check_rows(index, Index.open(candidate), append=append, moved=moved)
        candidate.replace(into or index.path)
    finally:
        candidate.unlink(missing_ok=True)
    return Index.open(into or index.path)


def _changed_settings(index: Index, reader: Reader) -> frozenset[str]:
    settings = reader.source.recorded()
    names = index.source.keys() | settings.keys()
    differing = {name for name in names if index.source.get(name) != settings.get(name)}
    elsewhere = {
        name for name in differing & PLACES if _is_alike(index.source.get(name), settings.get(name))
    }
    if others := differing - MAY_DIFFER - elsewhere:
        name = min(others)
        raise SourceError(
            f"{index.path} was made from another source: its {name} was "
            f"{index.source.get(name)!r} and is {settings.get(name)!r} now. {START_AGAIN}"
            + (f" {ONLY_MOVED}" if "/" in str(settings.get(name)) else "")  # a file
        )
    return frozenset(differing)


def _is_alike(old: Any, new: Any) -> bool:
    """Return whether two settings are places of one name."""
    places = [str(each) for each in (old, new) if each is not None and "/" in str(each)]
    return len(places) == 2 and len({each.rpartition("/")[2] for each in places}) == 1


def _moved(index: Index, reader: Reader) -> Reader | None:
    """Return the source as it lies elsewhere now, None where it is where it was.

    That is so where none of its files is where it was, and there are files of the same names and
    sizes instead.
    """
    if any(place in reader.files for place in index.shards):
        return None
    again: Reader = reader.source.open()
    if list(again.files.values()) != list(index.names.values()):
        return None
    if not again.files_are_folders:
        pairs = zip(again.files, index.shards.values(), strict=True)
        if any(state_elsewhere(place, shard) == "changed" for place, shard in pairs):
            return None
    return again


def _changed_tables(index: Index, reader: Reader) -> tuple[Place, ...]:
    """Return the tables that changed, which hold no images, and files whose time alone did.

    The rows of both are listed again and compared. Any other file that changed is refused.
    """
    if reader.files_are_folders:
        return ()  # the images themselves are checked when they are read
    states = in_order(lambda item: state_of(*item), index.shards.items(), at=index.shards)
    changed = []
    for path, state in zip(index.shards, states, strict=True):
        if state == "gone" or (state == "changed" and not reader.may_be_rewritten):
            what = "has changed" if state == "changed" else "is gone"
            raise SourceError(
                f"{path} {what} since it was indexed in {index.path}. Restore it, or delete the "
                f"index and the store to start again. {ONLY_MOVED}"
            )
        if state != "same":
            changed.append(path)
    beside = {place: index.beside.get(str(place), {}) for place in reader.files_beside}
    changed += [place for place, about in beside.items() if state_of(place, about) != "same"]
    return tuple(changed)


def _added_files(index: Index, reader: Reader) -> tuple[Place, ...]:
    if left_out := [path for path in index.shards if path not in reader.files]:
        raise SourceError(
            f"{left_out[0]} was indexed in {index.path}, but the source's path, "
            f"{reader.place}, does not match it any more. {START_AGAIN} {ONLY_MOVED}"
        )
    unreadable = {
        place for place, about in index.unreadable.items() if state_of(place, about) == "same"
    }
    return tuple(
        file for file in reader.files if file not in index.shards and file not in unreadable
    )


def _check_rows(old: Index, new: Index, *, append: bool, moved: bool) -> None:
    """Refuse an index that does not begin with the rows of the one before it, as they were."""
    if left_out := [field for field in old.fields if field not in new.fields]:
        raise SourceError(
            f"{old.path} has captions under {left_out[0]!r}, which the source no longer gives. "
            f"Add it to `captions` of the source again."
        )
    if new.rows < old.rows:
        raise SourceError(
            f"The source has {new.rows} rows now, {old.path} has {old.rows}. Restore it; or: "
            f"{START_AGAIN}"
        )
    if old.class_names and (new.class_names or ())[: len(old.class_names)] != old.class_names:
        raise SourceError(
            f"The class names of the source do not begin with the {len(old.class_names)} in "
            f"{old.path}. {START_AGAIN}"
        )
    names = tuple(name for name in _names_compared(old) if not (moved and name == "path"))
    for start in range(0, old.rows, ROWS_PER_GROUP):
        stop = min(start + ROWS_PER_GROUP, old.rows)
        was, now = old.rows_between(start, stop, names), new.rows_between(start, stop, names)
        if not was.equals(now):
            raise _changed_row(old, start, was.to_pylist(), now.to_pylist())
    if new.rows > old.rows and not append:
        raise SourceError(
            f"The source has {new.rows - old.rows} more rows than {old.path}. {_NOT_WITHOUT_APPEND}"
        )


def _names_compared(old: Index) -> tuple[str, ...]:
    """Return the columns in which rows must be equal: labels and groups may come later."""
    not_there = {"label": not old.has_labels, "group": not old.has_groups}
    names = [name for name in old.columns if not not_there.get(name)]
    return (*names, *(f"caption/{field}" for field in old.fields))


def _changed_row(
    old: Index, start: int, was: list[dict[str, Any]], now: list[dict[str, Any]]
) -> SourceError:
    row = next(i for i in range(len(was)) if was[i] != now[i])
    name = next(name for name in was[row] if was[row][name] != now[row][name])
    return SourceError(
        f"Row {start + row} of {old.path}, {was[row]['key']!r}, has {name} = "
        f"{was[row][name]!r:.{SHOWN}}, but the source gives {now[row][name]!r:.{SHOWN}} now. The "
        f"same rows in the same order were expected, since their features are computed. Restore "
        f"the source; or: {START_AGAIN}"
    )


_NOT_WITHOUT_APPEND = (
    "No more rows than there are were expected. If they are wanted, run `sail extract` with "
    "--append: they come behind the others, which stay as they are. If not, narrow `path` or "
    "`rows` of the source."
)
