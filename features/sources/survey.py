"""What must be known of all samples of a source before the first row of its index is written.

Mostly the first samples tell. Where they do not (caption fields that come late, classes or groups
given by name, a shard that cannot be read), all samples are listed once for these facts, and then
once more to be written.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from features.errors import SourceError, UnreadableError
from features.sources.base import Counts, Sample, SourceReader
from features.storage.place import Place

MAX_FIELDS = 256
MAX_CLASSES = 10_000
"""Of so many names none is a class: they are texts that stand where labels are looked for."""
NAMES_SHOWN = 5
NAMED_LABELS = "labels given by name (each name a class)"
NAMED_GROUPS = "groups given by name (each name a compositional example)"
TOO_MANY_NAMES = f"labels of more than {MAX_CLASSES} different names (taken as unknown)"


@dataclass(frozen=True)
class Earlier:
    """The index that a new one takes the place of: its classes and groups keep their numbers."""

    place: str
    rows: int
    samples: Callable[[], Iterable[Sample]]
    shards: Collection[Place]
    counts: Mapping[str, int]
    grown_from: Sequence[int]
    class_names: tuple[str, ...] | None
    has_labels: bool
    group_names: tuple[str, ...]
    has_groups: bool


@dataclass
class Survey:
    """The facts."""

    fields: Sequence[str]
    labels: Mapping[str, int] | None = None
    """The label of each name of a class; None where labels are whole numbers."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, where the labels themselves give them."""
    groups: Mapping[str, int] | None = None
    """The number of each name of a group; None where groups are whole numbers."""
    unreadable: Mapping[Place, str] = field(default_factory=dict)
    """Shards that cannot be read, and why: nothing of them is used."""

    def number(self, sample: Sample, counts: Counts) -> None:
        """Give a sample the numbers of its class and group, where they are named."""
        if self.labels is not None and (sample.label_name or sample.label >= 0):
            sample.label = self.labels.get(sample.label_name or str(sample.label), -1)
            counts[NAMED_LABELS if self.labels else TOO_MANY_NAMES] += 1
        if self.groups is not None and (sample.group_name or sample.group >= 0):
            sample.group = self.groups[sample.group_name or str(sample.group)]
            counts[NAMED_GROUPS] += 1


def survey(
    reader: SourceReader[Any],
    files: Sequence[Place],
    *,
    before: Earlier | None,
    copied: Earlier | None,
) -> Survey:
    """List all samples for these facts.

    Args:
        reader: What lists the samples.
        files: Those to be listed.
        before: The index that the new one takes the place of.
        copied: The same, where its rows are taken over unread.

    Raises:
        SourceError: No file can be read, a name is none of the classes that are given, or there are
            more caption fields than make sense.
    """
    seen = _Seen(reader)
    for sample in copied.samples() if copied else ():
        seen.fields.update(sample.captions)
    rows = copied.rows if copied else 0
    unreadable: dict[Place, str] = {}
    for file in files:
        try:
            rows = seen.add_file(file, rows)
        except UnreadableError as error:
            unreadable[file] = str(error)
            if len(unreadable) == len(reader.files):
                raise
    facts = Survey(sorted_fields(seen.fields), unreadable=unreadable)
    if seen.names:
        facts.labels, facts.class_names = _numbered_labels(reader, seen.names, seen.labels, before)
    if seen.has_group_names:
        facts.groups = _numbered_groups(reader, seen.groups, before)
    return facts


class _Seen:
    """Gathers the facts of samples, one after the other."""

    def __init__(self, reader: SourceReader[Any]) -> None:
        self._reader = reader
        self.fields: set[str] = set()
        self.names: dict[str, None] = {}
        """Names of classes."""
        self.labels: set[int] = set()
        self.groups: dict[str, None] = {}
        self.has_group_names = False

    def add_file(self, file: Place, rows: int) -> int:
        """Take the samples of a file into account; return the rows there are then.

        Those of every share are, so that all shares number classes and groups alike.
        """
        limit = self._reader.source.rows
        for sample in self._reader.samples(file, Counts()):
            if limit is not None and rows >= limit:
                break
            self.add(sample)
            rows += self._reader.is_taken(sample)
        return rows

    def add(self, sample: Sample) -> None:
        """Take a sample into account."""
        self.fields.update(sample.captions)
        check_fields(self.fields, self._reader)
        if sample.label_name and len(self.names) <= MAX_CLASSES:
            self.names[sample.label_name] = None
        elif len(self.labels) <= MAX_CLASSES:
            self.labels.add(sample.label)
        if sample.group_name or sample.group >= 0:
            self.groups[sample.group_name or str(sample.group)] = None
            self.has_group_names = self.has_group_names or bool(sample.group_name)


def check_fields(fields: set[str], reader: SourceReader[Any]) -> None:
    """Refuse more caption fields than make sense."""
    if len(fields) > MAX_FIELDS:
        raise SourceError(
            f"{reader.place} has more than {MAX_FIELDS} caption fields. Name the ones you want in "
            f"`captions` of the source."
        )


def sorted_fields(fields: Iterable[str]) -> list[str]:
    """Return caption fields in their order: numbers first, then by length and name."""
    return sorted(fields, key=lambda name: (not name.isdigit(), len(name), name))


def _numbered_labels(
    reader: SourceReader[Any],
    names: Iterable[str],
    numbers: Iterable[int],
    before: Earlier | None,
) -> tuple[Mapping[str, int], tuple[str, ...] | None]:
    """Return the label of each name, and the names if it is the labels that give them."""
    given = reader.class_names()
    if given is not None:
        labels = {_letters(name): label for label, name in reversed(list(enumerate(given)))}
        if unknown := [name for name in names if _letters(name) not in labels]:
            raise SourceError(
                f"{len(unknown)} labels of {reader.place} are none of the {len(given)} class names "
                f"of {reader.source.class_names or 'the source'}: {unknown[:NAMES_SHOWN]}. Names "
                f"as there, or whole numbers from 0, were expected. Correct `class_names` of the "
                f"source, or the labels."
            )
        return {name: labels[_letters(name)] for name in names} | {
            str(number): number for number in numbers
        }, None
    every = {*names, *(str(number) for number in numbers if number >= 0)}
    if len(every) > MAX_CLASSES:
        return {}, None
    first: tuple[str, ...] = ()
    if before is not None and before.has_labels:
        if before.class_names is None:
            raise SourceError(
                f"{reader.place} has the label {next(iter(names))!r}, and {before.place} labels "
                f"that are numbers. Labels of one kind were expected. Give the new rows numbers."
            )
        first = before.class_names
    class_names = (*first, *sorted(every.difference(first)))
    return {name: label for label, name in enumerate(class_names)}, class_names


def _numbered_groups(
    reader: SourceReader[Any], names: Iterable[str], before: Earlier | None
) -> Mapping[str, int]:
    first: Sequence[str] = () if before is None else before.group_names
    if before is not None and before.has_groups and not first:
        raise SourceError(
            f"{reader.place} has groups with names, and {before.place} groups that are numbers. "
            f"Groups of one kind were expected. Give the new rows numbers."
        )
    return {name: number for number, name in enumerate(dict.fromkeys([*first, *names]))}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def facts_of_first(samples: Sequence[Sample], reader: SourceReader[Any]) -> Survey | None:
    """Return what the first samples tell of all, None where it takes a survey."""
    if any(sample.label_name or sample.group_name for sample in samples):
        return None
    fields = set(reader.known_fields).union(*(sample.captions for sample in samples))
    check_fields(fields, reader)
    return Survey(sorted_fields(fields))
