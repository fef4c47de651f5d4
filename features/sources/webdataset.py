"""Webdataset tars: members that share a base name are one sample."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from features.config import DataPattern
from features.errors import SailError, SourceError, UnreadableError
from features.sources.base import (
    IMAGE_SUFFIXES,
    NETPBM_SUFFIXES,
    OF_LATER,
    Counts,
    Keys,
    Known,
    Sample,
    matching_files,
    read_class_names,
)
from features.sources.joined import JoinableSettings, JoiningReader
from features.sources.tar import Member, TarFault, TarFile
from features.sources.text import decoded, lines_of
from features.status import Status
from features.storage import files
from features.storage.place import Place

OWN_NAMES = "classnames.txt"
OWN_TYPE = "dataset_type.txt"
MAX_TEXT_BYTES = 1 << 20
REPEATED = "captions that are in .txt and in .json (name one in `captions` to encode them once)"
SEVERAL_LINES = "captions of several lines in a .txt (each one caption)"
NOT_DECODED = "texts that are not in UTF-8 (left out; `encoding` says what they are in)"
NO_END = "tars without the blocks that end one (read; fetch them again if they were cut off)"
MAX_SUFFIXES_COUNTED = 32
_parse_json = json.JSONDecoder().decode


class WebdatasetSource(JoinableSettings):
    """Tar shards whose members share a base name: an image, and `.txt` or `.json` captions."""

    kind: Literal["webdataset"]
    path: DataPattern | tuple[DataPattern, ...]
    """Glob pattern(s) of the tar files, `{00000..00010}` too; each read in sorted order."""
    image: str | None = Field(default=None, json_schema_extra=OF_LATER)
    """Which member is the image, by all that follows the first dot of its name: `image.png` of
    `KEY.image.png`. Any member with the suffix of an image if not given."""

    @property
    def image_names(self) -> frozenset[str]:
        """Names of members that are images."""
        return IMAGE_SUFFIXES if self.image is None else frozenset({self.image.lower()})

    def _open(self, known: Known) -> "TarShards":
        return TarShards(self, matching_files(self.path), known)


class TarShards(JoiningReader[WebdatasetSource]):
    """Lists the samples of tars by their headers, and reads captions; images are not read.

    Rules: members of one base name (up to the first dot of the file's name) that follow each other
    are one sample. A base name that comes again, or the same member once more, is a duplicate: it
    keeps a row, numbered and quarantined. Captions or a label without an image keep a row,
    quarantined. Ignored and counted are members that are of no use to a sample, samples with
    neither image nor text, links, devices, and paths that lead out of the archive. A `.txt` is one
    caption, unless `dataset_type.txt` beside or above the tars says `retrieval`, as those of
    CLIP_benchmark do: then each of its lines is one.
    """

    _ids: Sequence[object] = ()
    """By what the sample at hand may be named in the table."""
    _depth_came_first = False
    """Whether the image of the sample at hand is of a kind that depth maps are of."""

    @cached_property
    def _of_use(self) -> set[str]:
        source = self.source
        captions = source.captions or ("caption",)
        return {"json", "txt", *captions, source.label or "txt"} | source.image_names

    @cached_property
    def _lines_are_captions(self) -> bool:
        folder = next(iter(self.files)).parent
        for place in (folder / OWN_TYPE, folder.parent / OWN_TYPE):
            try:
                return files.read(place).strip() == b"retrieval"
            except (OSError, SailError):  # none there, or a server that does not tell
                continue
        return False

    def own_class_names(self) -> tuple[tuple[str, ...], Place] | None:
        """Return those of `classnames.txt`, which CLIP_benchmark puts beside or above local tars.

        They are only compared: without names in the settings the shards have none.
        """
        folder = next(iter(self.files)).parent
        if self.source.class_names is None or not isinstance(folder, Path):
            return None
        for beside in (folder / OWN_NAMES, folder.parent / OWN_NAMES):
            if beside.is_file():
                return read_class_names(beside) or (), beside
        return None

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
                    counts["tars with data after their end that is no tar (ignored)"] += 1
                if not whole:
                    counts["tars without a sample"] += 1
                if not tar.has_end:
                    counts[NO_END] += 1
        except TarFault as fault:
            raise _worded(fault, file, whole) from fault
        except OSError as error:
            raise SourceError(
                f"{file} cannot be read ({error.strerror or error}). Make it readable, or take it "
                f"out of `path`."
            ) from error

    def _samples(self, tar: TarFile, file: Place, counts: Counts) -> Iterator[Sample]:
        keys = self.keys(file, counts)
        path = str(file)
        base: str | None = None
        sample: Sample | None = None
        suffixes: set[str] = set()
        for name, suffix, member in _parts(tar, keys, counts):
            if name != base or suffix in suffixes:
                if sample is not None:
                    yield self._finished(sample, counts)
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
            yield self._finished(sample, counts)

    def _add(
        self, sample: Sample, member: Member, suffix: str, tar: TarFile, counts: Counts
    ) -> None:
        if suffix in self.source.image_names:
            if sample.size >= 0:
                counts["second images of a sample, in another format (ignored)"] += 1
                if suffix in NETPBM_SUFFIXES or not self._depth_came_first:
                    return
            self._depth_came_first = suffix in NETPBM_SUFFIXES
            sample.offset, sample.size = member.offset, member.size
            return
        if is_cut := member.size > MAX_TEXT_BYTES:
            counts["texts over 1 MiB (cut there)"] += 1
        content = tar.read(member.offset, min(member.size, MAX_TEXT_BYTES))
        text = decoded(content, self.source.encoding, is_cut=is_cut)
        if text is None:
            counts[NOT_DECODED] += 1
            return
        self.describe(sample, self._record(suffix, text, counts), counts)

    def _record(self, suffix: str, text: str, counts: Counts) -> dict[str, Any]:
        if suffix == "json":
            record = _json_record(text, counts)
            if self.joined is not None:
                self._ids = [record.get(name) for name in (*self.joined.columns, "url", "key")]
            return record
        text = text.strip()
        if suffix == "txt" and self._lines_are_captions:
            return {"txt": [line.strip() for line in lines_of(text) if line.strip()]}
        if suffix == "txt" and "\n" in text:
            counts[SEVERAL_LINES] += 1
        return {suffix: text}

    def _finished(self, sample: Sample, counts: Counts) -> Sample:
        if sample.size < 0:
            counts["samples without an image (quarantined)"] += 1
            sample.problem = sample.problem or int(Status.MISSING_IMAGE)
        self.join(sample, self._ids, counts)
        self._ids = ()
        others = [text.strip() for field, text in sample.captions.items() if field != "txt"]
        if (text := sample.captions.get("txt")) and text in others:
            counts[REPEATED] += 1
        return sample


def _parts(tar: TarFile, keys: Keys, counts: Counts) -> Iterator[tuple[str, str, Member]]:
    """Yield base name, suffix and place of the members that can be part of a sample."""
    archive, names = 0, set[str]()
    for member in tar.members():
        name, suffix = split_name(member.name)
        if member.archive != archive:
            archive, names = member.archive, keys.names()
            counts["archives put behind each other in one file (read)"] += 1
        if not (member.regular and suffix and is_inside(member.name)):
            counts["members that are no plain file of a sample (ignored)"] += 1
            continue
        if name in names:  # of another shard, which numbers its samples alike
            name = f"{name}@{archive + 1}"
        yield name, suffix, member


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


def _json_record(text: str, counts: Counts) -> dict[str, Any]:
    try:
        record = _parse_json(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        counts["members .json that are no JSON object (ignored)"] += 1
        return {}
    return record


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
        return UnreadableError(
            f"{file} cannot be read as a tar: {fault.reason}. An uncompressed tar was expected. "
            f"Unpack a compressed one once, fetch a damaged one again, or take it out of `path`."
        )
    return UnreadableError(
        f"{file} is {what} at byte {fault.byte} (whole samples before it: {whole_samples}): "
        f"{fault.reason}. Fetch it again, or take it out of `path`."
    )
