"""Webdataset tars: members that share a base name are one sample."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from features.config import DataPattern
from features.errors import SourceError
from features.sources.base import (
    IMAGE_SUFFIXES,
    Counts,
    Known,
    Sample,
    SourceReader,
    SourceSettings,
    matching_files,
    read_class_names,
)
from features.status import Status
from features.storage.place import Place
from features.storage.requests import open_ranges

BLOCK = 512
WINDOW_BYTES = 1 << 12
"""Bytes fetched per read: enough for a header and a caption. More would be image data to skip."""
MAX_HEADER_BYTES = 1 << 20
ZEROS = bytes(BLOCK)
ADLER_BASE = 65521
REGULAR = frozenset(b"\x0007")
WITHOUT_CONTENT = frozenset(b"123456")  # links, devices, folders, pipes
OLD_SPARSE = ord("S")
LONG_NAME, PAX = ord("L"), ord("x")
ABOUT_OTHERS = frozenset(b"KgXV")  # a link's target, defaults, Solaris, a volume's label
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


class TarFault(Exception):  # noqa: N818 - the caller words it for the user
    """A tar that cannot be read, or not to its end."""

    def __init__(self, reason: str, *, byte: int = 0, cut_off: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.byte = byte
        self.cut_off = cut_off


class Member(NamedTuple):
    """A member of a tar and the place of its content."""

    name: str
    offset: int
    size: int
    regular: bool
    """A plain file, whose content stands as it is at `offset`."""


@dataclass(slots=True)
class _Extended:
    """What the headers before a member's own say about it."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


class TarFile:
    """An uncompressed tar, open for reading; use it with `with`."""

    def __init__(self, place: Place) -> None:
        self._file = open_ranges(place)
        self.size = self._file.size
        self.has_trailing_data = False
        """After listing: something other than zeros follows the end of the archive."""
        self._window = b""
        self._window_start = 0

    def __enter__(self) -> "TarFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def members(self) -> Iterator[Member]:
        """Yield the members in their order, each only if its content is there in full.

        Raises:
            TarFault: A header is damaged, or the tar ends before its end mark (two blocks of
                zeros).
        """
        offset = 0
        extended: _Extended | None = None
        while (header := self._header(offset)) != ZEROS:
            kind = header[156]
            size = _number(header[124:136], offset)
            if extended is not None and extended.size is not None and kind not in b"Lx":
                size = extended.size
            start = offset + BLOCK
            if kind == OLD_SPARSE:
                start = self._after_sparse_map(header, start)
            offset = start if kind in WITHOUT_CONTENT else start + -(-size // BLOCK) * BLOCK
            if offset > self.size:
                raise TarFault("the content of a member is cut off", byte=self.size, cut_off=True)
            if kind in (LONG_NAME, PAX):
                extended = self._extend(extended, kind, start, size)
            elif kind not in ABOUT_OTHERS:
                yield _member(header, kind, start, size, extended)
                extended = None
        self._check_end(offset)

    def read(self, offset: int, size: int) -> bytes:
        """Return some bytes of the file, fewer at its end."""
        skipped = offset - self._window_start
        if skipped < 0 or skipped + size > len(self._window):
            self._window = self._file.pread(max(size, WINDOW_BYTES), offset)
            self._window_start, skipped = offset, 0
        return self._window[skipped : skipped + size]

    def _header(self, offset: int) -> bytes:
        header = self.read(offset, BLOCK)
        if len(header) == BLOCK and (_checksum_is_right(header) or header == ZEROS):
            return header
        if offset == 0:
            raise TarFault(_what_it_is(header))
        if len(header) < BLOCK:
            raise TarFault("the blocks that end a tar are missing", byte=self.size, cut_off=True)
        raise TarFault("the header there is damaged", byte=offset)

    def _check_end(self, offset: int) -> None:
        """Two blocks of zeros end a tar. One may be what is left of a tar that was cut off."""
        if self.read(offset + BLOCK, BLOCK) != ZEROS:
            raise TarFault("the blocks that end a tar are missing", byte=self.size, cut_off=True)
        self.has_trailing_data = bool(self.read(offset, MAX_HEADER_BYTES).strip(b"\0"))

    def _extend(self, extended: _Extended | None, kind: int, start: int, size: int) -> _Extended:
        if size > MAX_HEADER_BYTES:
            raise TarFault(f"a header of {size} bytes is too long to be one", byte=start)
        extended = extended or _Extended()
        content = self.read(start, size)
        if kind == LONG_NAME:
            extended.name = _text(content.split(b"\0", 1)[0])
            return extended
        for keyword, value in _pax_records(content, start):
            if keyword == b"path":
                extended.name = _text(value)
            elif keyword == b"size":
                extended.size = _decimal(value, start)
            elif keyword.startswith(b"GNU.sparse."):
                extended.sparse = True
        return extended

    def _after_sparse_map(self, header: bytes, start: int) -> int:
        more = header[482]
        while more:
            block = self.read(start, BLOCK)
            if len(block) < BLOCK:
                raise TarFault("a header is cut off", byte=self.size, cut_off=True)
            start, more = start + BLOCK, block[504]
        return start


def _member(header: bytes, kind: int, start: int, size: int, extended: _Extended | None) -> Member:
    raw = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's magic differs: no prefix there
        raw = header[345:500].split(b"\0", 1)[0] + b"/" + raw
    name = _text(raw)
    regular = kind in REGULAR
    if extended is not None:
        name = name if extended.name is None else extended.name
        regular = regular and not extended.sparse
    return Member(name, start, size, regular and name[-1:] != "/")


def _checksum_is_right(header: bytes) -> bool:
    """Compare the sum of the bytes, the checksum's own counted as spaces, with the checksum.

    The low half of adler32 is one more than the sum, modulo 65521: fifty times as fast as `sum`.
    """
    field = header[148:156]
    try:
        stated = int(field.strip(b" \0"), 8)  # of a block of zeros: no number
    except ValueError:
        return False
    difference = sum(field) - 8 * ord(" ")
    if zlib.adler32(header) & 0xFFFF == (stated + difference + 1) % ADLER_BASE:
        return True
    signed = sum(byte - 256 if byte > 127 else byte for byte in header)  # as old tars have it
    return signed - difference == stated


def _number(field: bytes, byte: int) -> int:
    """Return a number written in octal, or, where the first bit is set, in binary."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise TarFault("the header there has no size that can be read", byte=byte)
    return number


def _pax_records(content: bytes, byte: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the records "<length> <keyword>=<value>", each a line, of an extended header."""
    while content.strip(b"\0"):
        length = _decimal(content.split(b" ", 1)[0], byte)
        record = content[:length]
        keyword, separator, value = record.partition(b" ")[2].partition(b"=")
        if not separator or not record.endswith(b"\n"):
            raise TarFault("the extended header there is damaged", byte=byte)
        yield keyword, value[:-1]
        content = content[length:]


def _decimal(digits: bytes, byte: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise TarFault("the extended header there is damaged", byte=byte)
    return int(digits)


def _text(name: bytes) -> str:
    """Decode a name; bytes that are not UTF-8 are written as hexadecimal, so that names differ."""
    return name.decode("utf-8", errors="backslashreplace")


def _what_it_is(header: bytes) -> str:
    if not header:
        return "it is empty"
    for magic, name in COMPRESSED.items():
        if header.startswith(magic):
            return f"it is compressed with {name}, so that no image could be read by its place"
    return "it does not begin with the header of a tar"


OWN_NAMES = "classnames.txt"
MAX_TEXT_BYTES = 1 << 20
REPEATED = "captions that are in .txt and in .json (name one in `captions` to encode them once)"
MAX_SUFFIXES_COUNTED = 32
_parse_json = json.JSONDecoder().decode


class WebdatasetSource(SourceSettings):
    """Tar shards whose members share a base name: an image, and `.txt` or `.json` captions."""

    kind: Literal["webdataset"]
    path: DataPattern | tuple[DataPattern, ...]
    """Glob pattern(s) of the tar files, `{00000..00010}` too; each read in sorted order."""

    def _open(self, known: Known) -> "TarShards":
        return TarShards(self, matching_files(self.path), known)


class TarShards(SourceReader[WebdatasetSource]):
    """Lists the samples of tars by their headers, and reads captions; images are not read.

    Rules: members of one base name (up to the first dot of the file's name) that follow each other
    are one sample. A base name that comes again, or the same member once more, is a duplicate: it
    keeps a row, numbered and quarantined. Captions or a label without an image keep a row,
    quarantined. Ignored and counted are members that are of no use to a sample, samples with
    neither image nor text, links, devices, and paths that lead out of the archive.
    """

    @cached_property
    def _of_use(self) -> set[str]:
        source = self.source
        return {"json", "txt", *source.captions, source.label or "txt"} | IMAGE_SUFFIXES

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
                    counts["tars with data after their end (ignored)"] += 1
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
        self.describe(sample, _record(suffix, content, counts), counts)


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
        f"{fault.reason}. Fetch it again, or take it out of `path`."
    )
