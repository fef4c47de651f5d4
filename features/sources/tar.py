"""Reads the headers of uncompressed tars: which member is where; a damaged tar is told apart."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
    archive: int = 0
    """Which of several archives in one file (`cat a.tar b.tar`) it stands in."""


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
        """After listing: something that is no archive follows the end of the last one."""
        self.has_end = True
        """After listing: the blocks of zeros that end an archive are there."""
        self._window = b""
        self._window_start = 0

    def __enter__(self) -> "TarFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def members(self) -> Iterator[Member]:
        """Yield the members in their order, each only if its content is there in full.

        Archives that were put behind each other in one file are read one after the other. A file
        that ends behind a whole member, without the blocks of zeros that end a tar, is read too:
        some writers leave them out. `has_end` tells.

        Raises:
            TarFault: A header is damaged, or the file ends within a header or a member.
        """
        offset = archive = 0
        extended: _Extended | None = None
        while header := self._header(offset):
            if header == ZEROS:
                following = self._following_archive(offset)
                if following is None:
                    break
                offset, archive, extended = following, archive + 1, None
                continue
            kind = header[156]
            start, size = self._content(header, offset, extended)
            offset = start + -(-size // BLOCK) * BLOCK
            if kind in (LONG_NAME, PAX):
                extended = self._extend(extended, kind, start, size)
            elif kind not in ABOUT_OTHERS:
                yield _member(header, kind, start, size, extended, archive)
                extended = None
        if extended is not None:
            raise TarFault("a member is missing behind its header", byte=self.size, cut_off=True)
        self.has_end = bool(header)

    def _content(self, header: bytes, offset: int, extended: _Extended | None) -> tuple[int, int]:
        """Return where the content that follows a header begins, and its size, all of it there."""
        kind, start = header[156], offset + BLOCK
        size = _number(header[124:136], offset)
        if extended is not None and extended.size is not None and kind not in b"Lx":
            size = extended.size
        if kind == OLD_SPARSE:
            start = self._after_sparse_map(header, start)
        if kind in WITHOUT_CONTENT:
            size = 0
        if start + size > self.size:  # what is missing of the last block does not matter
            raise TarFault("the content of a member is cut off", byte=self.size, cut_off=True)
        return start, size

    def read(self, offset: int, size: int) -> bytes:
        """Return some bytes of the file, fewer at its end."""
        skipped = offset - self._window_start
        if skipped < 0 or skipped + size > len(self._window):
            self._window = self._file.pread(max(size, WINDOW_BYTES), offset)
            self._window_start, skipped = offset, 0
        return self._window[skipped : skipped + size]

    def _header(self, offset: int) -> bytes:
        """Return the block at an offset: a header, zeros, or nothing at the end of the file."""
        header = self.read(offset, BLOCK) if offset < self.size else b""
        if len(header) == BLOCK and (header == ZEROS or _checksum_is_right(header)):
            return header
        if offset == 0:
            raise TarFault(_what_it_is(header))
        if len(header) == BLOCK:
            raise TarFault("the header there is damaged", byte=offset)
        if header.strip(b"\0"):
            raise TarFault("a header is cut off", byte=self.size, cut_off=True)
        return b""

    def _following_archive(self, offset: int) -> int | None:
        """Return where an archive begins behind the zeros at an offset, None where none does."""
        behind = self.read(offset, MAX_HEADER_BYTES)
        zeros = len(behind) - len(behind.lstrip(b"\0"))
        if zeros == len(behind):
            if offset + zeros < self.size:
                what = f"only zeros follow, more than {MAX_HEADER_BYTES} bytes of them"
                raise TarFault(what, byte=offset, cut_off=True)
            return None
        following = offset + zeros // BLOCK * BLOCK
        if _checksum_is_right(self.read(following, BLOCK)):
            return following
        self.has_trailing_data = True
        return None

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


def _member(
    header: bytes, kind: int, start: int, size: int, extended: _Extended | None, archive: int
) -> Member:
    raw = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's magic differs: no prefix there
        raw = header[345:500].split(b"\0", 1)[0] + b"/" + raw
    name = _text(raw)
    regular = kind in REGULAR
    if extended is not None:
        name = name if extended.name is None else extended.name
        regular = regular and not extended.sparse
    return Member(name, start, size, regular and name[-1:] != "/", archive)


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
