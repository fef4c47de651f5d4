"""Writes an index, in bounded memory: samples are listed, and written a row group at a time."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.config import ClassFolderSource, ScenesSource, Source
from features.errors import SourceError
from features.partial import partial_path, remove_leftovers
from features.sources import Counts, Sample, Shards, open_source
from features.storage.files import in_order, version
from features.storage.place import Place, RemotePath

VERSION = 1
ROWS_PER_GROUP = 4096
MAX_FIELDS = 256
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


class _MoreFields(Exception):  # noqa: N818 - asks for another pass
    """A sample has captions under a field that the samples before it did not have."""


def build_index(source: Source, path: Path, on_progress: Callable[[int], None]) -> None:
    """List the samples of a source and write them to `path`: all of them, or nothing.

    The fields of the first samples are mostly those of all. If not, everything is listed for its
    fields, and then once more to be written.

    Raises:
        SourceError: The source cannot be read, or holds no samples.
    """
    progress = _Progress(on_progress)
    try:
        _write(source, path, None, progress)
    except _MoreFields:
        _write(source, path, _all_fields(source), progress)


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


def _write(source: Source, path: Path, fields: Sequence[str] | None, progress: _Progress) -> None:
    shards = open_source(source)
    class_names = shards.class_names()
    counts = Counts()
    groups = _groups_of_samples(source, shards, counts)
    first = next(groups, None)
    if first is None:
        raise SourceError(
            f"{_place(source)} holds no samples{_in_words(counts)}. Images with captions or labels "
            f"were expected. Correct `path` of the source."
        )
    if fields is None:
        fields = _sorted_fields({field for sample in first for field in sample.captions})
    with _RowWriter(path, fields) as writer:
        for samples in itertools.chain([first], groups):
            writer.add(samples)
            progress.reach(writer.rows)
        shards.check()
        _check_labels(source, writer.greatest_label, class_names)
        for field in fields:
            counts[f"rows without caption {field!r}"] = writer.missing[field]
        about = {
            "version": VERSION,
            "source": settings_of(source),
            "shards": [] if isinstance(source, ClassFolderSource) else _versions(shards.files),
            "fields": list(fields),
            "class_names": class_names,
            "has_labels": writer.greatest_label >= 0,
            "has_groups": writer.greatest_group >= 0,
            "counts": dict(counts),
        }
        writer.finish(about)


class _RowWriter:
    """Writes samples as row groups of equal size, under another name until all are written."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        remove_leftovers(path.parent)
        self._partial = partial_path(path)
        self._fields = fields
        self._known = frozenset(fields)
        columns = COLUMNS | {f"caption/{field}": pa.string() for field in fields}
        self._schema = pa.schema(list(columns.items()))
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        self.rows = 0
        self.greatest_label = self.greatest_group = -1
        self.missing = dict.fromkeys(fields, 0)

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)

    def add(self, samples: Sequence[Sample]) -> None:
        """Write one row group."""
        if not all(self._known.issuperset(sample.captions) for sample in samples):
            raise _MoreFields
        table = {name: list(map(attrgetter(name), samples)) for name in COLUMNS}
        for field in self._fields:
            captions = [sample.captions.get(field, "") for sample in samples]
            self.missing[field] += sum(not caption or caption.isspace() for caption in captions)
            table[f"caption/{field}"] = captions
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


def _groups_of_samples(source: Source, shards: Shards, counts: Counts) -> Iterator[list[Sample]]:
    samples = itertools.chain.from_iterable(shards.samples(file, counts) for file in shards.files)
    limited = itertools.islice(samples, source.rows)
    while group := list(itertools.islice(limited, ROWS_PER_GROUP)):
        yield group


def _all_fields(source: Source) -> list[str]:
    fields: set[str] = set()
    for samples in _groups_of_samples(source, open_source(source), Counts()):
        fields.update(*(sample.captions for sample in samples))
        if len(fields) > MAX_FIELDS:
            raise SourceError(
                f"{_place(source)} has more than {MAX_FIELDS} caption fields. A few captions for "
                f"each image were expected. Name the ones you want in `captions` of the source."
            )
    return _sorted_fields(fields)


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


def _versions(files: Sequence[Place]) -> list[dict[str, Any]]:
    remote = isinstance(files[0], RemotePath)
    found = zip(files, in_order(version, files, remote=remote), strict=True)
    return [{"path": str(file), **about} for file, about in found]


def _in_words(counts: Counts) -> str:
    listed = "; ".join(f"{what}: {count}" for what, count in counts.most_common(4))
    return f" ({listed})" if listed else ""
