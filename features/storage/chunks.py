"""The files of a column: a chunk of values as they are, and four bytes of crc32c behind them."""

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int64, Shaped

from features.errors import FileEndsEarlyError, StoreCorruptError
from features.storage import files
from features.storage.files import appearing
from features.storage.place import Place, RemotePath
from features.storage.requests import read_into, read_ranges

CRC_BYTES = 4
NOT_THIS = "it is another chunk than the one that was written here"


def write_chunk(
    place: Place, values: np.ndarray, *, beside: Place, after: Sequence[Place] = ()
) -> int:
    """Write a chunk: it appears under its name as a whole, or not at all.

    After a power cut, too, a chunk on local disk that is there is whole, and there are those that
    it was written after; it may be gone itself, and is made again then.

    Args:
        place: Where.
        values: C-contiguous.
        beside: A file on local disk has a name beside this one until it is whole.
        after: Chunks without which it must not be there, of arrays of the same column.

    Returns:
        Its crc32c.
    """
    data = values.reshape(-1).view(np.uint8).data
    checksum = _checksum(values)
    if not isinstance(place, Path) or not isinstance(beside, Path):
        files.write(place, b"".join((data, checksum)))
        return int.from_bytes(checksum, "little")
    place.parent.mkdir(parents=True, exist_ok=True)
    column = beside.parent.parent
    folders = {
        folder: None
        for chunk in after
        if isinstance(chunk, Path)
        for folder in chunk.parents
        if folder.is_relative_to(column)
    }
    # Not unbuffered: such a write may end early, on a disk that is nearly full or after 2 GiB.
    with (
        appearing(place, beside=beside, after=folders, stays=False) as partial,
        partial.open("wb") as file,
    ):
        file.write(data)
        file.write(checksum)
    return int.from_bytes(checksum, "little")


def read_chunk(place: Place, buffer: np.ndarray, *, verify: bool) -> int:
    """Fill a buffer with a chunk; on local disk without a copy.

    Returns:
        The crc32c in the file.

    Raises:
        StoreCorruptError: The file is missing, of another length, or (with `verify`) damaged.
    """
    target = buffer.reshape(-1).view(np.uint8).data
    if isinstance(place, Path):
        with _opened(place) as file:
            count = _fill(file, target)
            checksum = file.read(CRC_BYTES + 1)
    else:
        content = _content(place, buffer.nbytes + CRC_BYTES)
        count = min(len(content), buffer.nbytes)
        target[:count] = content[:count]
        checksum = bytes(content[count:])
    if count != buffer.nbytes or len(checksum) != CRC_BYTES:
        size = count + len(checksum)
        raise StoreCorruptError(place, f"it has {size} bytes, not {buffer.nbytes + CRC_BYTES}")
    if verify and checksum != _checksum(buffer):
        raise StoreCorruptError(place, "its crc32c does not match its bytes")
    return int.from_bytes(checksum, "little")


def read_pieces(
    path: Path, buffer: np.ndarray, rows: int, *, verify: bool, expected: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a chunk on local disk piece by piece, in a buffer that is small enough for the cache.

    Args:
        path: Where.
        buffer: C-contiguous, for some rows; every piece overwrites the one before.
        rows: Of the chunk.
        verify: Whether to check the crc32c, which is known after the last piece only.
        expected: The crc32c that the chunk must have, where it is known.

    Yields:
        The first row of a piece, and its rows.

    Raises:
        StoreCorruptError: The file is missing, of another length, or (with `verify`) damaged.
    """
    crc = 0
    with _opened(path) as file:
        for first in range(0, rows, len(buffer)):
            piece = buffer[: rows - first]
            data = piece.reshape(-1).view(np.uint8)
            if _fill(file, data.data) != piece.nbytes:
                raise StoreCorruptError(path, f"it ends within {rows} rows")
            if verify:
                crc = google_crc32c.extend(crc, data)
            yield first, piece
        checksum = file.read(CRC_BYTES + 1)
    if len(checksum) != CRC_BYTES:
        raise StoreCorruptError(path, f"{len(checksum)} bytes follow its {rows} rows")
    if verify and checksum != crc.to_bytes(CRC_BYTES, "little"):
        raise StoreCorruptError(path, "its crc32c does not match its bytes")
    if expected is not None and checksum != expected.to_bytes(CRC_BYTES, "little"):
        raise StoreCorruptError(path, NOT_THIS)


def read_part(place: Place, start: int, part: np.ndarray) -> None:
    """Fill an array with the bytes of a chunk from `start`, without the rest of it.

    Raises:
        StoreCorruptError: The file is missing or too short.
    """
    target = part.reshape(-1).view(np.uint8).data
    if isinstance(place, Path):
        with _opened(place) as file:
            file.seek(start)
            if _fill(file, target) != part.nbytes:
                raise StoreCorruptError(place, "the file is cut off")
        return
    try:
        read_into(place, start, target)
    except FileEndsEarlyError as error:
        raise StoreCorruptError(place, "the file is cut off") from error
    except FileNotFoundError as error:
        raise _missing(place) from error


def crc32c_behind(path: Path) -> int:
    """Return the crc32c behind the values of a chunk on local disk.

    Raises:
        StoreCorruptError: The file is missing or too short.
    """
    with _opened(path) as file:
        if file.seek(0, os.SEEK_END) < CRC_BYTES:
            raise StoreCorruptError(path, "the file is cut off")
        file.seek(-CRC_BYTES, os.SEEK_END)
        return int.from_bytes(file.read(CRC_BYTES), "little")


def whole_file(place: Place, limit: int) -> bytes | None:
    """Return the content of a file of a store; None if there is none.

    Raises:
        StoreCorruptError: It is no regular file, or has more bytes than `limit`.
    """
    if not isinstance(place, Path):
        try:
            return files.read(place)
        except FileNotFoundError:
            return None
    if not os.path.lexists(place):
        return None
    with _opened(place) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise StoreCorruptError(place, f"it has {size} bytes, more than {limit}")
        return bytes(file.readall())


def _opened(path: Path) -> Any:
    try:
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise _missing(path) from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise StoreCorruptError(path, "it is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise StoreCorruptError(path, "it is not a regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its other end


def _fill(file: Any, target: memoryview) -> int:
    """Read from an unbuffered file until it ends or all is here: Linux reads 2 GiB at once."""
    count = 0
    while count < len(target) and (read := file.readinto(target[count:])):
        count += read
    return count


def _content(place: RemotePath, size: int) -> memoryview:
    try:
        return read_ranges(place, [(0, size)])[0]
    except FileEndsEarlyError as error:
        raise StoreCorruptError(place, f"it has {error.size} bytes, not {size}") from error
    except FileNotFoundError as error:
        raise _missing(place) from error


def _missing(place: Place) -> StoreCorruptError:
    return StoreCorruptError(place, "the file is missing although its rows are done")


def _checksum(values: np.ndarray) -> bytes:
    crc: int = google_crc32c.value(values.reshape(-1).view(np.uint8))
    return crc.to_bytes(CRC_BYTES, "little")


def scatter_rows(
    path: Path,
    rows: Shaped[np.ndarray, "all_rows dim"],
    places: Int64[np.ndarray, "chunk_rows"],
) -> bool:
    """Read each row of a chunk to a place of its own, by preadv(2). The crc32c is not looked at.

    Python's `os.preadv` would want an object for every row; here the system is given the addresses
    as an array.

    Args:
        path: On local disk.
        rows: C-contiguous; where they go.
        places: Of the rows of the chunk, in `rows`.

    Returns:
        Whether they are there. If not (the system has no such call, or the file is missing or cut
        off), the places hold anything, and `read_pieces` reads it or says why not.

    Raises:
        IndexError: A place is not in `rows`.
        ValueError: `rows` cannot be written to by address.
    """
    if PREADV is None:
        return False
    if places.min() < 0 or places.max() >= len(rows):
        raise IndexError(f"places {places.min()} to {places.max()} are not all in {len(rows)} rows")
    if not (rows.flags.c_contiguous and rows.flags.writeable):
        raise ValueError("rows are not C-contiguous and writeable")
    size = rows[0].nbytes
    targets = np.empty((len(places), 2), dtype=np.uintp)  # struct iovec: address, bytes
    targets[:, 0] = rows.ctypes.data + places * size
    targets[:, 1] = size
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        is_whole = os.fstat(file).st_size == len(places) * size + CRC_BYTES
        return is_whole and _read(file, targets, size)
    finally:
        os.close(file)


def _read(file: int, targets: Shaped[np.ndarray, "chunk_rows 2"], size: int) -> bool:
    for first in range(0, len(targets), IOV_MAX):
        some = targets[first : first + IOV_MAX]
        if PREADV(file, some.ctypes.data, len(some), first * size) != len(some) * size:
            return False
    return True


def _preadv() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).preadv
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    function.restype = ctypes.c_ssize_t
    return function


PREADV = _preadv()  # with a pointer's 64 bits: int64 is its off_t
IOV_MAX = 1024  # the most that Linux takes at once
