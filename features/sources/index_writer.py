"""Writes an index: one row for each sample of a source."""

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import SourceError, UnreadableError
from features.sources.base import OTHER_SHARE, Counts, Sample, SourceReader
from features.sources.survey import Earlier, Survey, facts_of_first, survey
from features.status import Status
from features.storage.files import appearing, remove_leftovers
from features.storage.parallel import in_order
from features.storage.place import Place
from features.storage.versions import described

Reader = SourceReader[Any]
VERSION = 2
ROWS_PER_GROUP = 4096
MAX_IMAGE_BYTES = 1 << 28  # no photograph is as large; reading it would take as much memory
METADATA_KEY = b"sail"
NEVER_READ = (Status.MISSING_IMAGE, Status.IMAGE_TOO_LARGE)
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


class _SurveyNeeded(Exception):  # noqa: N818 - asks for another pass
    """The first samples did not tell all that must be known of all of them."""


def write_index(
    reader: Reader,
    path: Path,
    on_progress: Callable[[int], None],
    *,
    before: Earlier | None = None,
    is_copied: bool = False,
    needs_images: bool = False,
) -> None:
    """Write an index; the rows of another may be copied first, so that their files are not read.

    The first samples mostly tell all that must be known of all. If not, everything is listed for
    that, and then once more to be written.

    Args:
        reader: What lists the samples.
        path: Where the index goes.
        on_progress: Called now and then with the number of samples since the last call.
        before: The index that this one takes the place of.
        is_copied: Whether its rows are taken over unread.
        needs_images: Whether it is refused where not one sample has an image.

    Raises:
        SourceError: The source cannot be read, or holds no samples.
    """
    reported = 0

    def report(rows: int) -> None:  # each sample once, though it may be listed again
        nonlocal reported
        if rows > reported:
            on_progress(rows - reported)
            reported = rows

    copied = before if is_copied else None
    writer = _IndexWriter(reader, path, report, before, copied, needs_images=needs_images)
    try:
        writer.write(None)
    except (_SurveyNeeded, UnreadableError) as reason:
        if isinstance(reason, UnreadableError) and len(reader.files) == 1:
            raise
        writer.write(survey(reader, writer.files, before=before, copied=copied))


class _IndexWriter:
    """Writes an index: all of it, or nothing."""

    def __init__(
        self,
        reader: Reader,
        path: Path,
        report: Callable[[int], None],
        before: Earlier | None,
        copied: Earlier | None,
        *,
        needs_images: bool,
    ) -> None:
        self._reader, self._path, self._report = reader, path, report
        self._before, self._copied, self._needs_images = before, copied, needs_images
        there = () if copied is None else copied.shards
        self.files = [file for file in reader.files if file not in there]
        """Those to be listed."""

    def write(self, facts: Survey | None) -> None:
        """Write all rows.

        Args:
            facts: What is known of all samples; only what the first ones tell if not given.
        """
        reader, path, counts = self._reader, self._path, Counts()
        groups = self._groups(counts, facts)
        first = next(groups, None)
        if first is None:
            raise _holds_nothing(reader, "samples", counts)
        facts = facts or facts_of_first(first, reader)
        if facts is None:
            raise _SurveyNeeded
        columns = COLUMNS | BOX if any(sample.box for sample in first) else COLUMNS
        captions = ((f"caption/{field}", pa.string()) for field in facts.fields)
        schema = pa.schema([*columns.items(), *captions])
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        class_names = facts.class_names or reader.class_names()
        tally = _Tally()
        with (
            appearing(path) as partial,
            pq.ParquetWriter(
                partial, schema, compression="zstd", write_page_checksum=True
            ) as writer,
        ):
            for samples in itertools.chain([first], groups):
                table = _columns_of(samples, columns, facts, counts, tally)
                writer.write_table(_as_table(table, schema))
                tally.add(table)
                self._report(tally.rows)
            if self._copied is None:
                reader.check()
                counts.update(reader.leftover())
            _check_labels(reader, tally.greatest["label"], class_names)
            if self._needs_images and tally.images == 0:
                raise _holds_nothing(reader, "images", counts)
            counts.update(
                {f"rows without caption {each!r}": tally.missing[each] for each in facts.fields}
            )
            about = self._about(facts, tally, class_names, counts)
            writer.add_key_value_metadata({METADATA_KEY: json.dumps(about).encode()})

    def _groups(self, counts: Counts, facts: Survey | None) -> Iterator[list[Sample]]:
        """Yield the samples as row groups."""
        known: Iterable[Sample] = ()
        if self._copied is not None:
            known = self._copied.samples()
            counts.update(self._copied.counts)
        unreadable = facts.unreadable if facts else {}
        files = [file for file in self.files if file not in unreadable]
        listed = itertools.chain.from_iterable(self._listed(file, counts) for file in files)
        samples = itertools.islice(itertools.chain(known, listed), self._reader.source.rows)
        while group := list(itertools.islice(samples, ROWS_PER_GROUP)):
            for sample in group:
                if sample.size > MAX_IMAGE_BYTES and not sample.problem:
                    counts["images over 256 MiB (quarantined)"] += 1
                    sample.problem = int(Status.IMAGE_TOO_LARGE)
            yield group

    def _listed(self, file: Place, counts: Counts) -> Iterator[Sample]:
        for sample in self._reader.samples(file, counts):
            if self._reader.is_taken(sample):
                yield sample
            else:
                counts[OTHER_SHARE] += 1

    def _about(
        self,
        facts: Survey,
        tally: "_Tally",
        class_names: tuple[str, ...] | None,
        counts: Counts,
    ) -> dict[str, Any]:
        reader, before = self._reader, self._before
        grown_from = () if before is None else (*before.grown_from, before.rows)
        beside = {str(place): described(place) for place in reader.files_beside}
        about = {
            "version": VERSION,
            "source": reader.source.recorded(),
            "shards": _described(reader, facts.unreadable),
            "grown_from": [length for length in grown_from if length < tally.rows],
            "fields": list(facts.fields),
            "class_names": class_names,
            "has_labels": tally.greatest["label"] >= 0,
            "has_groups": tally.greatest["group"] >= 0,
            "counts": dict(counts),
        }
        later = {
            "group_names": list(facts.groups or ()),
            "unreadable": {
                str(place): {"why": why} | described(place)
                for place, why in facts.unreadable.items()
            },
            "beside": beside,
            "seen": [] if facts.fields or not reader.has_captions else reader.picker.seen,
        }
        return about | {name: value for name, value in later.items() if value}


class _Tally:
    """What is summed up over the rows of an index."""

    def __init__(self) -> None:
        self.rows = self.images = 0
        self.greatest = {"label": -1, "group": -1}
        self.missing = Counts()
        """Rows without a caption, by field."""

    def add(self, table: Mapping[str, Sequence[Any]]) -> None:
        """Take the columns of some rows into account."""
        self.rows += len(table["key"])
        self.images += sum(problem not in NEVER_READ for problem in table["problem"])
        self.greatest = {name: max(most, *table[name]) for name, most in self.greatest.items()}


def _holds_nothing(reader: Reader, what: str, counts: Counts) -> SourceError:
    listed = "; ".join(f"{each}: {count}" for each, count in counts.most_common(6) if count)
    settings = [f"`{name}`" for name in ("path", "image", "images") if hasattr(reader.source, name)]
    more = f" {reader.hint}" if reader.hint else ""
    return SourceError(
        f"{reader.place} holds no {what}{listed and f' ({listed})'}.{more} Images with captions or "
        f"labels were expected. Correct {' or '.join(settings)} of the source."
    )


def _columns_of(
    samples: Sequence[Sample],
    columns: Iterable[str],
    facts: Survey,
    counts: Counts,
    tally: _Tally,
) -> dict[str, list[Any]]:
    known = set(facts.fields)
    if not all(known.issuperset(sample.captions) for sample in samples):
        raise _SurveyNeeded
    if facts.labels is not None or facts.groups is not None:
        for sample in samples:
            facts.number(sample, counts)
    elif any(sample.label_name or sample.group_name for sample in samples):
        raise _SurveyNeeded
    table = {name: list(map(attrgetter(name), samples)) for name in columns}
    for name in facts.fields:
        captions = [sample.captions.get(name, "") for sample in samples]
        tally.missing[name] += sum(not caption or caption.isspace() for caption in captions)
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


def _check_labels(reader: Reader, greatest: int, class_names: tuple[str, ...] | None) -> None:
    if class_names is not None and greatest >= len(class_names):
        raise SourceError(
            f"A sample has label {greatest}, but {reader.source.class_names or 'the source'} names "
            f"only {len(class_names)} classes, from 0. Correct `class_names` of the source."
        )


def _described(reader: Reader, unreadable: Collection[Place]) -> list[dict[str, Any]]:
    """Describe files by name and version, folders by name."""
    files = {file: name for file, name in reader.files.items() if file not in unreadable}
    known = [{"path": str(file), "name": name} for file, name in files.items()]
    if reader.files_are_folders:
        return known
    versions = in_order(described, files, at=files)
    return [about | found for about, found in zip(known, versions, strict=True)]
