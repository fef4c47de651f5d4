"""Writes an index, in bounded memory: samples are listed, and written a row group at a time."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.config import ClassFolderSource, ScenesSource, Source
from features.errors import SourceError
from features.partial import partial_path, remove_leftovers
from features.sources import Counts, Sample, Shards, open_source
from features.status import Status
from features.storage.files import version
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath

VERSION = 2
ROWS_PER_GROUP = 4096
MAX_FIELDS = 256
MAX_IMAGE_BYTES = 1 << 28  # no photograph is as large; reading it would take as much memory
METADATA_KEY = b"sail"
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


@dataclass(frozen=True)
class Earlier:
    """What an index has already, and what the one that follows it begins with."""

    rows: int = 0
    names: Mapping[Place, str] = field(default_factory=dict)
    """Files in the order of their rows, with what their keys begin with."""
    grown_from: tuple[int, ...] = ()
    """Rows there were before each time that rows were appended."""
    samples: Callable[[], Iterable[Sample]] | None = None
    """Gives the rows, so that their files are not read; if not given, they are listed again."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Those of the samples that are given."""

    def grown_to(self, rows: int) -> list[int]:
        """Return the rows there were before each growth, up to the one to so many rows."""
        return [*self.grown_from, *([self.rows] if 0 < self.rows < rows else [])]


def build_index(
    source: Source, path: Path, on_progress: Callable[[int], None], earlier: Earlier | None = None
) -> None:
    """List the samples of a source and write them to `path`: all of them, or nothing.

    The fields of the first samples are mostly those of all. If not, everything is listed for its
    fields, and then once more to be written.

    Raises:
        SourceError: The source cannot be read, or holds no samples.
    """
    listing = _Listing(source, earlier or Earlier())
    progress = _Progress(on_progress)
    try:
        _write(listing, path, None, progress)
    except _MoreFields:
        every = listing.groups(listing.open(), Counts())
        _write(listing, path, _fields_of(source, every), progress)


def settings_of(source: Source) -> dict[str, Any]:
    """Return the settings of a source as the index records them."""
    return source.model_dump(mode="json")


class _Progress:
    """Passes on each sample once, though it may be listed again."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._reported = 0

    def reach(self, samples: int) -> None:
        if samples > self._reported:
            self._on_progress(samples - self._reported)
            self._reported = samples


@dataclass(frozen=True)
class _Listing:
    """Gives all samples of a source, as often as asked."""

    source: Source
    earlier: Earlier

    def open(self) -> Shards:
        return open_source(self.source, self.earlier.names)

    def groups(self, shards: Shards, counts: Counts) -> Iterator[list[Sample]]:
        """Yield the samples as row groups."""
        files: Iterable[Place] = shards.files
        known: Iterable[Sample] = ()
        if self.earlier.samples is not None:
            files = [file for file in files if file not in self.earlier.names]
            known = self.earlier.samples()
            counts.update(self.earlier.counts)
        listed = itertools.chain.from_iterable(shards.samples(file, counts) for file in files)
        samples = itertools.islice(itertools.chain(known, listed), self.source.rows)
        while group := list(itertools.islice(samples, ROWS_PER_GROUP)):
            _quarantine_giants(group, counts)
            yield group

    def check(self, shards: Shards) -> None:
        """Refuse settings that no sample fitted, where all of them were listed."""
        if self.earlier.samples is None:
            shards.check()


def _write(
    listing: _Listing, path: Path, fields: Sequence[str] | None, progress: _Progress
) -> None:
    source, shards = listing.source, listing.open()
    class_names = shards.class_names()
    counts = Counts()
    groups = listing.groups(shards, counts)
    first = next(groups, None)
    if first is None:
        raise SourceError(
            f"{_place(source)} holds no samples{_in_words(counts)}. Images with captions or labels "
            f"were expected. Correct `path` of the source."
        )
    if fields is None:
        fields = _fields_of(source, [first])
    columns = COLUMNS | BOX if any(sample.box for sample in first) else COLUMNS
    with _RowWriter(path, columns, fields) as writer:
        for samples in itertools.chain([first], groups):
            writer.add(samples)
            progress.reach(writer.rows)
        listing.check(shards)
        _check_labels(source, writer.greatest_label, class_names)
        for field in fields:
            counts[f"rows without caption {field!r}"] = writer.missing[field]
        about = {
            "version": VERSION,
            "source": settings_of(source),
            "shards": _described(source, shards.files),
            "grown_from": listing.earlier.grown_to(writer.rows),
            "fields": list(fields),
            "class_names": class_names,
            "has_labels": writer.greatest_label >= 0,
            "has_groups": writer.greatest_group >= 0,
            "counts": dict(counts),
        }
        writer.finish(about)


class _RowWriter:
    """Writes samples as row groups of equal size, under another name until all are written."""

    def __init__(
        self, path: Path, columns: Mapping[str, pa.DataType], fields: Sequence[str]
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        remove_leftovers(path.parent)
        self._partial = partial_path(path)
        self._fields = fields
        self._known = frozenset(fields)
        self._columns = columns
        captions = {f"caption/{field}": pa.string() for field in fields}
        self._schema = pa.schema([*columns.items(), *captions.items()])
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        self.rows = 0
        self.greatest_label = self.greatest_group = -1
        self.missing = dict.fromkeys(fields, 0)

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._writer.close()
        finally:
            if kind is not None:
                self._partial.unlink(missing_ok=True)

    def add(self, samples: Sequence[Sample]) -> None:
        """Write one row group."""
        if not all(self._known.issuperset(sample.captions) for sample in samples):
            raise _MoreFields
        table = {name: list(map(attrgetter(name), samples)) for name in self._columns}
        for name in self._fields:
            captions = [sample.captions.get(name, "") for sample in samples]
            self.missing[name] += sum(not caption or caption.isspace() for caption in captions)
            table[f"caption/{name}"] = captions
        try:
            rows = pa.table(table, schema=self._schema)
        except UnicodeEncodeError as error:  # a file name of other bytes than UTF-8
            raise SourceError(
                f"A key or path cannot be written as text: {error.object!r}. Names in UTF-8 were "
                f"expected. Rename the file."
            ) from error
        self._writer.write_table(rows)
        self.rows += len(samples)
        self.greatest_label = max(self.greatest_label, *table["label"])
        self.greatest_group = max(self.greatest_group, *table["group"])

    def finish(self, about: dict[str, Any]) -> None:
        """Add the metadata and give the file its name."""
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(about).encode()})
        self._writer.close()
        self._partial.replace(self._path)


def _fields_of(source: Source, groups: Iterable[Sequence[Sample]]) -> list[str]:
    """Return the caption fields that the samples have, in order."""
    fields: set[str] = set()
    for samples in groups:
        fields.update(*(sample.captions for sample in samples))
        if len(fields) > MAX_FIELDS:
            raise SourceError(
                f"{_place(source)} has more than {MAX_FIELDS} caption fields. A few "
                f"captions for each image were expected. Name the ones you want in `captions` of "
                f"the source."
            )
    return _sorted_fields(fields)


def _quarantine_giants(samples: Sequence[Sample], counts: Counts) -> None:
    for sample in samples:
        if sample.size > MAX_IMAGE_BYTES and not sample.problem:
            counts["images over 256 MiB (quarantined)"] += 1
            sample.problem = int(Status.IMAGE_TOO_LARGE)


def _sorted_fields(fields: set[str]) -> list[str]:
    return sorted(fields, key=lambda name: (not name.isdigit(), len(name), name))


def _check_labels(source: Source, greatest: int, class_names: tuple[str, ...] | None) -> None:
    if class_names is not None and greatest >= len(class_names):
        raise SourceError(
            f"A sample has label {greatest}, but {source.class_names or 'the source'} names only "
            f"{len(class_names)} classes, from 0. A name for every label was expected. Correct "
            f"`class_names` of the source."
        )


def _place(source: Source) -> str:
    return source.kind if isinstance(source, ScenesSource) else str(source.path)


def _described(source: Source, files: Mapping[Place, str]) -> list[dict[str, Any]]:
    """Describe files by name and version; of a folder, the time says nothing of what is in it."""
    described = [{"path": str(file), "name": name} for file, name in files.items()]
    if isinstance(source, ClassFolderSource):
        return described
    remote = any(isinstance(file, RemotePath) for file in files)
    versions = in_order(version, files, remote=remote)
    return [about | found for about, found in zip(described, versions, strict=True)]


def _in_words(counts: Counts) -> str:
    listed = "; ".join(f"{what}: {count}" for what, count in counts.most_common(4))
    return f" ({listed})" if listed else ""
