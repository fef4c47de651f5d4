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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.config import ExtractConfig
from features.errors import SourceError
from features.sources import SOURCES, Counts, Sample, SourceReader
from features.status import Status
from features.storage import files
from features.storage.files import appearing, partial_path, remove_leftovers, version
from features.storage.parallel import in_order
from features.storage.place import Place, as_place
from features.storage.reading import Expected, check_regular, reading

Reader = SourceReader[Any]
Images = Sequence[bytes | None]
VERSION = 2
ROWS_PER_GROUP = 4096
MAX_FIELDS = 256
MAX_IMAGE_BYTES = 1 << 28  # no photograph is as large; reading it would take as much memory
METADATA_KEY = b"sail"
EXPECTED = Expected(
    "An index of this version", "Delete it, and run `sail extract` again.", SourceError
)
COLUMNS = {
    "key": pa.string(),
    "path": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "problem": pa.uint8(),
    "label": pa.int32(),
    "group": pa.int32(),
}
BOX = {"box": pa.list_(pa.int32(), 4)}  # a column only where the samples are parts of images


class _MoreFields(Exception):  # noqa: N818 - asks for another pass
    """A sample has captions under a field that the samples before it did not have."""


def build_index(
    reader: Reader, path: Path, *, on_progress: Callable[[int], None] = lambda _: None
) -> "Index":
    """List every sample of a source, and write the index: all of it, or nothing.

    Args:
        reader: What lists the samples.
        path: Where the index goes.
        on_progress: Called now and then with the number of samples since the last call.

    Raises:
        SourceError: The source cannot be read, or holds no samples.
    """
    _build(reader, path, on_progress)
    return Index.open(path)


def _build(
    reader: Reader,
    path: Path,
    on_progress: Callable[[int], None],
    grown_from: Sequence[int] = (),
    copied: "Index | None" = None,
) -> None:
    """Write an index; the rows of another are copied first, so that their files are not read.

    The fields of the first samples are mostly those of all. If not, everything is listed for its
    fields, and then once more to be written.
    """
    reported = 0

    def report(rows: int) -> None:  # each sample once, though it may be listed again
        nonlocal reported
        if rows > reported:
            on_progress(rows - reported)
            reported = rows

    try:
        _write(reader, path, None, report, grown_from, copied)
    except _MoreFields:
        fields = _fields_of(reader, _groups(reader, Counts(), copied))
        _write(reader, path, fields, report, grown_from, copied)


def _groups(reader: Reader, counts: Counts, copied: "Index | None") -> Iterator[list[Sample]]:
    """Yield the samples as row groups."""
    known: Iterable[Sample] = ()
    new = list(reader.files)
    if copied is not None:
        known = copied.samples()
        new = [file for file in new if file not in copied.shards]
        counts.update(copied.counts)
    listed = itertools.chain.from_iterable(reader.samples(file, counts) for file in new)
    samples = itertools.islice(itertools.chain(known, listed), reader.source.rows)
    while group := list(itertools.islice(samples, ROWS_PER_GROUP)):
        for sample in group:
            if sample.size > MAX_IMAGE_BYTES and not sample.problem:
                counts["images over 256 MiB (quarantined)"] += 1
                sample.problem = int(Status.IMAGE_TOO_LARGE)
        yield group


def _write(
    reader: Reader,
    path: Path,
    fields: Sequence[str] | None,
    report: Callable[[int], None],
    grown_from: Sequence[int],
    copied: "Index | None",
) -> None:
    class_names, counts = reader.class_names(), Counts()
    groups = _groups(reader, counts, copied)
    first = next(groups, None)
    if first is None:
        listed = "; ".join(f"{what}: {count}" for what, count in counts.most_common(4))
        raise SourceError(
            f"{reader.place} holds no samples{listed and f' ({listed})'}. Images with captions or "
            f"labels were expected. Correct `path` of the source."
        )
    if fields is None:
        fields = _fields_of(reader, [first])
    columns = COLUMNS | BOX if any(sample.box for sample in first) else COLUMNS
    schema = pa.schema([*columns.items(), *((f"caption/{field}", pa.string()) for field in fields)])
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    rows, greatest, missing = 0, {"label": -1, "group": -1}, Counts()
    with (
        appearing(path) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for samples in itertools.chain([first], groups):
            table = _columns_of(samples, columns, fields, missing)
            writer.write_table(_as_table(table, schema))
            rows += len(samples)
            greatest = {name: max(most, *table[name]) for name, most in greatest.items()}
            report(rows)
        if copied is None:
            reader.check()
        _check_labels(reader, greatest["label"], class_names)
        counts.update({f"rows without caption {field!r}": missing[field] for field in fields})
        about = {
            "version": VERSION,
            "source": reader.source.recorded(),
            "shards": _described(reader),
            "grown_from": [length for length in grown_from if length < rows],
            "fields": list(fields),
            "class_names": class_names,
            "has_labels": greatest["label"] >= 0,
            "has_groups": greatest["group"] >= 0,
            "counts": dict(counts),
        }
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(about).encode()})


def _columns_of(
    samples: Sequence[Sample], columns: Iterable[str], fields: Sequence[str], missing: Counts
) -> dict[str, list[Any]]:
    known = set(fields)
    if not all(known.issuperset(sample.captions) for sample in samples):
        raise _MoreFields
    table = {name: list(map(attrgetter(name), samples)) for name in columns}
    for name in fields:
        captions = [sample.captions.get(name, "") for sample in samples]
        missing[name] += sum(not caption or caption.isspace() for caption in captions)
        table[f"caption/{name}"] = captions
    return table


def _as_table(columns: Mapping[str, list[Any]], schema: pa.Schema) -> pa.Table:
    try:
        return pa.table(columns, schema=schema)
    except UnicodeEncodeError as error:  # a file name of other bytes than UTF-8
        raise SourceError(
            f"A key or path is not UTF-8 and cannot be written as text: {error.object!r}. Rename "
            f"the file."
        ) from error


def _fields_of(reader: Reader, groups: Iterable[Sequence[Sample]]) -> list[str]:
    """Return the caption fields that the samples have: numbers first, then by length and name."""
    fields: set[str] = set()
    for samples in groups:
        fields.update(*(sample.captions for sample in samples))
        if len(fields) > MAX_FIELDS:
            raise SourceError(
                f"{reader.place} has more than {MAX_FIELDS} caption fields. Name the ones you "
                f"want in `captions` of the source."
            )
    return sorted(fields, key=lambda name: (not name.isdigit(), len(name), name))


def _check_labels(reader: Reader, greatest: int, class_names: tuple[str, ...] | None) -> None:
    if class_names is not None and greatest >= len(class_names):
        raise SourceError(
            f"A sample has label {greatest}, but {reader.source.class_names or 'the source'} names "
            f"only {len(class_names)} classes, from 0. Correct `class_names` of the source."
        )


def _described(reader: Reader) -> list[dict[str, Any]]:
    """Describe files by name and version, folders by name."""
    described = [{"path": str(file), "name": name} for file, name in reader.files.items()]
    if reader.files_are_folders:
        return described
    versions = in_order(version, reader.files, at=reader.files)
    return [about | found for about, found in zip(described, versions, strict=True)]


GROUPS_KEPT = 4
MAX_PIXELS = ExtractConfig().max_pixels
NEVER_READ = (Status.MISSING_IMAGE, Status.IMAGE_TOO_LARGE)


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

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Open an index.

        Raises:
            SourceError: It is missing, damaged, or was not written by this program.
        """
        with reading(path, EXPECTED):
            return cls(check_regular(path))

    @property
    def names(self) -> dict[Place, str]:
        """Files in the order of their rows, with what their keys begin with."""
        return {path: str(shard["name"]) for path, shard in self.shards.items()}

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
SHOWN = 80
START_AGAIN = "Give this run another `run.dir`, or delete the index and the store to start again."

ONLY_MOVED = (
    "If the same files lie elsewhere now, or only their times changed, delete the index alone: it "
    "is written again, and the features stay."
)


@dataclass(frozen=True)
class Changes:
    """How a source differs from its index."""

    settings: frozenset[str]
    """Settings that differ: which captions are picked, where the files are, how many rows."""
    tables: tuple[Place, ...]
    """Tables of captions that were written anew."""
    files: tuple[Place, ...]
    """Shards, or folders of a class, that were not there."""

    def __bool__(self) -> bool:
        return bool(self.settings or self.tables or self.files)


def find_changes(index: Index, reader: Reader) -> Changes:
    """Compare a source with what was indexed, without reading its samples.

    Raises:
        SourceError: A file changed or is gone, or the settings are those of other rows.
    """
    return Changes(
        settings=_changed_settings(index, reader),
        tables=_changed_tables(index, reader),
        files=_added_files(index, reader),
    )


def update_index(
    index: Index,
    reader: Reader,
    changes: Changes,
    *,
    append: bool,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Index:
    """Bring an index up to date. It is replaced as a whole: a kill leaves the old or the new one.

    Shards that were indexed are read again only if their captions are picked otherwise.

    Args:
        index: What was indexed earlier.
        reader: The source as it is now, opened with the files that the index knows.
        changes: What `find_changes` found between these two.
        append: Whether there may be more rows: those of further shards, or at the end of a table.
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
    candidate = partial_path(index.path)
    is_same = not (changes.tables or changes.settings - {"path"} or reader.source.rows)
    grown_from = (*index.grown_from, index.rows)
    try:
        _build(reader, candidate, on_progress, grown_from, index if is_same else None)
        _check_rows(index, Index.open(candidate), append=append)
        candidate.replace(index.path)
    finally:
        candidate.unlink(missing_ok=True)
    return Index.open(index.path)


def _changed_settings(index: Index, reader: Reader) -> frozenset[str]:
    settings = reader.source.recorded()
    names = index.source.keys() | settings.keys()
    differing = {name for name in names if index.source.get(name) != settings.get(name)}
    if others := differing - MAY_DIFFER:
        name = min(others)
        raise SourceError(
            f"{index.path} was made from another source: its {name} was "
            f"{index.source.get(name)!r} and is {settings.get(name)!r} now. {START_AGAIN}"
            + (f" {ONLY_MOVED}" if "/" in str(settings.get(name)) else "")  # a file
        )
    return frozenset(differing)


def _changed_tables(index: Index, reader: Reader) -> tuple[Place, ...]:
    """Return the tables that changed, which hold no images; refuse any other file that did."""
    if reader.files_are_folders:
        return ()  # the images themselves are checked when they are read
    changed = []
    versions = in_order(files.version_or_none, index.shards, at=index.shards)
    for (path, shard), found in zip(index.shards.items(), versions, strict=True):
        if found is not None and shard == {"path": str(path), "name": shard["name"], **found}:
            continue
        if found is None or not reader.may_be_rewritten:
            what = "has changed" if found else "is gone"
            raise SourceError(
                f"{path} {what} since it was indexed in {index.path}. Restore it, or delete the "
                f"index and the store to start again. {ONLY_MOVED}"
            )
        changed.append(path)
    return tuple(changed)


def _added_files(index: Index, reader: Reader) -> tuple[Place, ...]:
    if left_out := [path for path in index.shards if path not in reader.files]:
        raise SourceError(
            f"{left_out[0]} was indexed in {index.path}, but the source's path, "
            f"{reader.place}, does not match it any more. {START_AGAIN} {ONLY_MOVED}"
        )
    return tuple(file for file in reader.files if file not in index.shards)


def _check_rows(old: Index, new: Index, *, append: bool) -> None:
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
    names = _names_compared(old)
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
