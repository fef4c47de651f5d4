"""Requests to a server: what fails or comes short is tried again, then told with its place."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from features.errors import FileEndsEarlyError, StorageError
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath
from features.storage.remote import (
    ATTEMPTS,
    Backend,
    Entry,
    backend,
    failure,
    is_broken_body,
    seconds_before,
)

T = TypeVar("T")
GAP_BYTES = 1 << 20
"""Ranges no further apart than this are read as one."""
PIECE_BYTES = 8 << 20
"""A long range is read as several of this size, at once."""


def tried(place: RemotePath, what: str, call: Callable[[Backend], T]) -> T:
    """Return what a call gives; failures name the place, and what was expected there."""
    server = backend(place)
    attempt = 0
    while True:
        try:
            return call(server)
        except server.errors as error:
            attempt += 1
            if attempt == ATTEMPTS or not is_broken_body(error):
                raise failure(place, error, what) from error
            time.sleep(seconds_before(attempt))


def entry(place: RemotePath) -> Entry:
    """Return the size and version of a file under a URL.

    Raises:
        PlaceNotFoundError: There is none.
        StorageError: The server fails.
    """
    return tried(place, "A file", lambda server: server.entry(place))


def read_into(place: RemotePath, start: int, buffer: Any) -> None:
    """Fill a buffer with the bytes of a file under a URL from `start`; long ones in pieces at once.

    Raises:
        FileEndsEarlyError: The file ends before the buffer is full.
        StorageError: The server fails.
    """
    view = memoryview(buffer).cast("B")

    def fill(offset: int) -> None:
        part = view[offset : offset + PIECE_BYTES]
        part[:] = _range(place, start + offset, start + offset + len(part))

    offsets = range(0, len(view), PIECE_BYTES)
    for _ in in_order(fill, offsets, at=place):
        pass


def read_ranges(place: RemotePath, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Return the bytes of ranges (start, stop) of a file under a URL; near ones come as one.

    Raises:
        FileEndsEarlyError: The file ends before one of them does.
        StorageError: The server fails.
    """
    blocks = _merged(ranges)
    content = in_order(lambda block: _range(place, *block), blocks, at=place)
    read = list(zip(blocks, content, strict=True))
    return [
        next(
            content[start - first : stop - first]
            for (first, last), content in read
            if first <= start and stop <= last
        )
        for start, stop in ranges
    ]


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges to ask for: those wanted, and what lies between two that are near."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start - merged[-1][1] <= GAP_BYTES:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _range(place: RemotePath, start: int, stop: int) -> memoryview:
    """Return a range; a body that is shorter is asked for again, with exponential back-off."""
    found = memoryview(b"")
    for attempt in range(ATTEMPTS if stop > start else 0):
        if attempt:
            time.sleep(seconds_before(attempt))
        found = _range_once(place, start, stop)
        if len(found) == stop - start:
            return found
    if stop > start:
        raise StorageError(
            f"{place} cannot be read: {len(found)} bytes came from byte {start}, {stop - start} "
            f"were asked for, {ATTEMPTS} times. A server that answers whole was expected. Run the "
            f"command again later, or copy the file; what is done is kept."
        )
    return found


def _range_once(place: RemotePath, start: int, stop: int) -> memoryview:
    what = f"An answer with its bytes up to {stop}"
    try:
        found = tried(place, what, lambda server: server.range(place, start, stop))
    except StorageError as error:
        if "status code: 416" not in str(error):  # no range of the file: it is shorter than it was
            raise
        found = memoryview(b"")
    if len(found) < stop - start:
        size = entry(place).size
        if size < stop:
            raise FileEndsEarlyError(place, size, stop)
    return found


BLOCK_BYTES = 4 << 20
BLOCKS_AHEAD = 4


@runtime_checkable
class Ranges(Protocol):
    """A file open for reading by place."""

    size: int

    def pread(self, size: int, offset: int) -> bytes:
        """Return the bytes from `offset` on, fewer at the end of the file."""

    def close(self) -> None:
        """Give back what it holds."""


def open_ranges(place: Place) -> Ranges:
    """Open a file for reading by place, mostly from its front to its back.

    Raises:
        OSError: It is not there, or cannot be read.
        StorageError: A server fails.
    """
    return _LocalRanges(place) if isinstance(place, Path) else _RemoteRanges(place)


class _LocalRanges:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait
        self.size = os.fstat(self._file).st_size
        self.pread = partial(os.pread, self._file)

    def close(self) -> None:
        os.close(self._file)


class _RemoteRanges:
    """Fetches whole blocks; where they are read in order, the next ones before they are needed."""

    def __init__(self, place: RemotePath) -> None:
        self.size = entry(place).size
        self._place = place
        self._pool = ThreadPoolExecutor(BLOCKS_AHEAD + 1, "sail-ahead")
        self._blocks: dict[int, Future[bytes]] = {}
        self._last = -1

    def pread(self, size: int, offset: int) -> bytes:
        stop = min(offset + size, self.size)
        if stop <= offset:
            return b""
        numbers = range(offset // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1)
        self._fetch(numbers)
        joined = b"".join(self._blocks[number].result() for number in numbers)
        start = offset - numbers[0] * BLOCK_BYTES
        return joined[start : start + stop - offset]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fetch(self, numbers: range) -> None:
        """Keep the blocks that are needed and those that will be."""
        in_order = numbers[0] - self._last in (0, 1)
        self._last = numbers[-1]
        wanted = range(numbers[0], numbers[-1] + 1 + (BLOCKS_AHEAD if in_order else 0))
        for number in [number for number in self._blocks if number not in wanted]:
            self._blocks.pop(number).cancel()
        for number in wanted:
            if number not in self._blocks and number * BLOCK_BYTES < self.size:
                self._blocks[number] = self._pool.submit(self._block, number)

    def _block(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        return bytes(read_ranges(self._place, [(start, min(start + BLOCK_BYTES, self.size))])[0])
