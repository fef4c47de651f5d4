"""A file that is read by place: on local disk directly, under a URL in blocks fetched ahead."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from features.storage.place import Place, RemotePath
from features.storage.requests import entry, read_ranges

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
        self._file = os.open(path, os.O_RDONLY)
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
