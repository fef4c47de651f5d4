"""The few operations on files that this project needs, the same for local disk and URLs."""

import io
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from features.errors import StorageError
from features.partial import appearing
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
U = TypeVar("U")
IN_FLIGHT = 32
"""Requests at once where there are many."""
GAP_BYTES = 1 << 20
"""Ranges no further apart than this are read as one."""
PIECE_BYTES = 8 << 20
"""A long range is read as several of this size, at once."""
BUFFER_BYTES = 4 << 20


class FileEndsEarlyError(StorageError):
    """A file under a URL is shorter than the range that was asked for."""

    def __init__(self, place: RemotePath, size: int, stop: int) -> None:
        self.size = size
        super().__init__(
            f"{place} has {size} bytes. At least {stop} were expected. Put the whole file there."
        )


def is_file(place: Place) -> bool:
    """Return whether there is a file."""
    if isinstance(place, Path):
        return place.is_file()
    return remote_size(place) is not None


def remote_size(place: RemotePath) -> int | None:
    """Return the bytes of a file under a URL, None if there is none."""
    try:
        return entry(place).size
    except FileNotFoundError:
        return None


def entry(place: RemotePath) -> Entry:
    """Return the size and version of a file under a URL.

    Raises:
        PlaceNotFoundError: There is none.
        StorageError: The server fails.
    """
    return _tried(place, "A file", lambda found: found.entry(place))


def version(place: Place) -> dict[str, list[int | str]]:
    """Return what changes when a file does: size and time, or size and ETag.

    Raises:
        FileNotFoundError: There is none.
    """
    if isinstance(place, Path):
        status = place.stat()
        return {"size_and_time": [status.st_size, status.st_mtime_ns]}
    about = entry(place)
    return {"size_and_etag": [about.size, about.version]}


def version_or_none(place: Place) -> dict[str, list[int | str]] | None:
    """Return the version of a file, None if there is none."""
    try:
        return version(place)
    except FileNotFoundError:
        return None


def names(folder: Place) -> list[str]:
    """Return the sorted names of what is in a folder; none if there is no folder."""
    if isinstance(folder, Path):
        return sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208 - names alone
    return [name for name, _ in children(folder)]


def children(folder: Place) -> list[tuple[str, int | None]]:
    """Return what is in a folder, sorted: names, and the size of what is a file."""
    if isinstance(folder, Path):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        return [(path.name, path.stat().st_size if path.is_file() else None) for path in paths]
    what = "A folder that can be listed"
    return _tried(folder, what, lambda found: sorted(found.children(folder)))


def files_below(folder: Place) -> Iterator[tuple[Place, int]]:
    """Yield the files in a folder and in its folders, with their sizes, in no stated order."""
    if isinstance(folder, Path):
        for path in folder.rglob("*"):
            if path.is_file():
                yield path, path.stat().st_size
        return
    what = "A folder that can be listed"
    for about in _tried(folder, what, lambda found: list(found.files(folder))):
        yield about.place, about.size


def read(place: Place) -> bytes:
    """Return the content of a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if isinstance(place, Path):
        return place.read_bytes()
    return _tried(place, "A file", lambda found: bytes(found.whole(place)))


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
    for _ in in_order(fill, offsets, remote=len(offsets) > 1):
        pass


def read_ranges(place: RemotePath, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Return the bytes of ranges (start, stop) of a file under a URL; near ones come as one.

    Raises:
        FileEndsEarlyError: The file ends before one of them does.
        StorageError: The server fails.
    """
    blocks = _merged(ranges)
    content = in_order(lambda block: _range(place, *block), blocks, remote=len(blocks) > 1)
    read = list(zip(blocks, content, strict=True))
    return [
        next(
            content[start - first : stop - first]
            for (first, last), content in read
            if first <= start and stop <= last
        )
        for start, stop in ranges
    ]


def open_file(place: Place) -> io.BufferedReader:
    """Open a file for reading; one under a URL is read by ranges.

    Raises:
        FileNotFoundError: There is none.
    """
    if isinstance(place, Path):
        return place.open("rb")
    return io.BufferedReader(_RangedFile(place), BUFFER_BYTES)


def write(place: Place, content: bytes) -> None:
    """Write a file: it appears under its name as a whole, or not at all."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with appearing(place) as partial:
            partial.write_bytes(content)
        return
    _tried(place, "A place that can be written", lambda found: found.put(place, content))


def delete(place: Place) -> None:
    """Remove a file, if it is there."""
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return
    _tried(place, "A file that can be deleted", lambda found: found.delete(place))


def zarr_store(folder: Place) -> Any:
    """Return what zarr opens: the path, or a store that reads a URL."""
    return folder if isinstance(folder, Path) else backend(folder).zarr(folder)


def in_order(
    function: Callable[[T], U], items: Iterable[T], *, remote: bool
) -> Generator[U, None, None]:
    """Yield `function(item)` in order; where it waits for a server, many at once.

    Args:
        function: Called by several threads if `remote`.
        items: Taken no further ahead than there are requests at once.
        remote: Whether to do so.
    """
    if not remote:
        yield from map(function, items)
        return
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT, "sail-request") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _RangedFile(io.RawIOBase):
    """A file under a URL; each read is a request, so it belongs into a buffer."""

    def __init__(self, place: RemotePath) -> None:
        self._place = place
        self._size = entry(place).size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        if count:
            read_into(self._place, self._position, view[:count])
            self._position += count
        return count


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
        found = _tried(place, what, lambda server: server.range(place, start, stop))
    except StorageError as error:
        if "status code: 416" not in str(error):  # no range of the file: it is shorter than it was
            raise
        found = memoryview(b"")
    if len(found) < stop - start:
        size = entry(place).size
        if size < stop:
            raise FileEndsEarlyError(place, size, stop)
    return found


def _tried(place: RemotePath, what: str, call: Callable[[Backend], T]) -> T:
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
