"""Webdataset tars: members that share a base name are one sample."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from features.class_lists import check_order
from features.config import WebdatasetSource
from features.errors import SourceError
from features.sources.sample import (
    IMAGE_SUFFIXES,
    CaptionPicker,
    Counts,
    Keys,
    Sample,
    matching_files,
    named_files,
    read_class_names,
    whole_number,
)
from features.sources.tar import Member, TarFault, TarFile
from features.status import Status
from features.storage.place import Place

OWN_NAMES = "classnames.txt"
MAX_TEXT_BYTES = 1 << 20
REPEATED = "captions that are in .txt and in .json (name one in `captions` to encode them once)"
MAX_SUFFIXES_COUNTED = 32
_parse_json = json.JSONDecoder().decode


class TarShards:
    """Reads the headers of tars, and the text of their captions; the images stay where they are.

    Rules: members of one base name (up to the first dot of the file's name) that follow each other
    are one sample. A base name that comes again, or the same member once more, is a duplicate: it
    keeps a row, numbered and quarantined. Captions or a label without an image keep a row,
    quarantined. Ignored and counted are members that are of no use to a sample, samples with
    neither image nor text, links, devices, and paths that lead out of the archive.
    """

    def __init__(self, source: WebdatasetSource, known: Mapping[Place, str]) -> None:
        self.files = named_files(matching_files(source.path), known)
        self.picker = CaptionPicker(source.captions, str(source.path))
        self._source = source
        self._of_use = {"json", "txt", *source.captions, source.label or "txt"} | IMAGE_SUFFIXES

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the labels, where the recipe gives them.

        Raises:
            SourceError: `classnames.txt`, which CLIP_benchmark puts beside or above local tars, has
                them in another order.
        """
        given = read_class_names(self._source.class_names)
        folder = next(iter(self.files)).parent
        if given is None or not isinstance(folder, Path):
            return given
        for beside in (folder / OWN_NAMES, folder.parent / OWN_NAMES):
            if beside.is_file():
                own = read_class_names(beside) or ()
                by = f"class_names = {self._source.class_names}"
                check_order(given, own, given_by=by, own_by=str(beside))
                break
        return given

    def check(self) -> None:
        """Refuse a name of captions that no sample had."""
        self.picker.check()

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield the samples of one tar.

        Raises:
            SourceError: The tar is compressed, damaged, or cut off.
        """
        whole = 0
        try:
            with TarFile(file) as tar:
                for sample in self._samples(tar, file, counts):
                    whole += 1
                    yield sample
                if tar.has_trailing_data:
                    counts["tars with data after their end (ignored)"] += 1
        except TarFault as fault:
            raise _worded(fault, file, whole) from fault
        except OSError as error:
            raise SourceError(
                f"{file} cannot be read ({error.strerror or error}). A tar was expected there. "
                f"Make it readable, or take it out of `path`."
            ) from error

    def _samples(self, tar: TarFile, file: Place, counts: Counts) -> Iterator[Sample]:
        keys = Keys(self.files[file], counts)
        path = str(file)
        base: str | None = None
        sample: Sample | None = None
        suffixes: set[str] = set()
        for member in tar.members():
            name, suffix = split_name(member.name)
            if not (member.regular and suffix and is_inside(member.name)):
                counts["members that are no plain file of a sample (ignored)"] += 1
                continue
            if name != base or suffix in suffixes:
                if sample is not None:
                    yield _finished(sample, counts)
                base, sample = name, None
                suffixes.clear()
            suffixes.add(suffix)
            if suffix not in self._of_use:
                _count_suffix(suffix, counts)
                continue
            if sample is None:
                key, problem = keys.of(name)
                sample = Sample(key, path, problem=problem)
            self._add(sample, member, suffix, tar, counts)
        if sample is not None:
            yield _finished(sample, counts)

    def _add(
        self, sample: Sample, member: Member, suffix: str, tar: TarFile, counts: Counts
    ) -> None:
        if suffix in IMAGE_SUFFIXES:
            if sample.size >= 0:
                counts["second images of a sample, in another format (ignored)"] += 1
                return
            sample.offset, sample.size = member.offset, member.size
            return
        if member.size > MAX_TEXT_BYTES:
            counts["texts over 1 MiB (cut there)"] += 1
        content = tar.read(member.offset, min(member.size, MAX_TEXT_BYTES))
        record = _record(suffix, content, counts)
        if captions := self.picker.pick(record, counts):
            sample.captions |= captions
        source = self._source
        if source.label and source.label in record:
            sample.label = whole_number(record[source.label], counts)
        if source.group and source.group in record:
            sample.group = whole_number(record[source.group], counts)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as webdataset does.

    Returns:
        Base name with its folder, and the suffix in lower case; no suffix (as webdataset ignores
        the member) where there is no dot, or nothing before it.
    """
    folder, slash, last = name.removeprefix("./").rpartition("/")
    base, _, suffix = last.partition(".")
    if not base:
        return name, ""
    return folder + slash + base, suffix.lower()


def is_inside(name: str) -> bool:
    """Return whether a member's path stays within the archive."""
    return name[0] != "/" and (".." not in name or ".." not in name.split("/"))


def _record(suffix: str, content: bytes, counts: Counts) -> dict[str, Any]:
    text = content.decode("utf-8", errors="replace").removeprefix("\ufeff")
    if suffix != "json":
        return {suffix: text.strip()}
    try:
        record = _parse_json(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        counts["members .json that are no JSON object (ignored)"] += 1
        return {}
    return record


def _finished(sample: Sample, counts: Counts) -> Sample:
    if sample.size < 0:
        counts["samples without an image (quarantined)"] += 1
        sample.problem = sample.problem or int(Status.MISSING_IMAGE)
    text = sample.captions.get("txt")
    if text and text in (each.strip() for name, each in sample.captions.items() if name != "txt"):
        counts[REPEATED] += 1
    return sample


def _count_suffix(suffix: str, counts: Counts) -> None:
    """Count a member that is not used, by suffix while there are few different ones."""
    name = f"members .{suffix} (not used)"
    if name not in counts and len(counts) >= MAX_SUFFIXES_COUNTED:
        name = "members with other suffixes (not used)"
    counts[name] += 1


def _worded(fault: TarFault, file: Place, whole_samples: int) -> SourceError:
    if fault.cut_off:
        what = "cut off"
    elif fault.byte:
        what = "damaged"
    else:
        return SourceError(
            f"{file} cannot be read as a tar: {fault.reason}. An uncompressed tar was expected. "
            f"Unpack a compressed one once, fetch a damaged one again, or take it out of `path`."
        )
    return SourceError(
        f"{file} is {what} at byte {fault.byte} (whole samples before it: {whole_samples}): "
        f"{fault.reason}. A whole tar was expected. Fetch it again, or take it out of `path`."
    )
