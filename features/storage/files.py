"""The few operations on files that this project needs, the same for local disk and URLs."""

import io
import os
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from features.errors import StorageError
from features.partial import partial_path
from features.storage.place import Place, RemotePath
from features.storage.remote import Entry, backend, failure

T = TypeVar("T")
U = TypeVar("U")
IN_FLIGHT = 32
"""Requests at once where there are many."""
PIECE_BYTES = 8 << 20
"""A long range is read as several of this size, at once."""
BUFFER_BYTES = 4 << 20
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.2


class FileEndsEarlyError(StorageError):
    """A file under a URL is shorter than the range that was asked for."""

    def __init__(self, place: RemotePath, size: int, stop: int) -> None:
        self.size = size
        super().__init__(
            f"{place} has {size} bytes. At least {stop} were expected. Put the whole file there."
        )


@contextmanager
def failures_named(place: Place, what: str) -> Iterator[None]:
    """Turn what a client raises into a `StorageError` that names the place.

    Args:
        place: What is asked for; nothing is changed where it is local.
        what: What is expected, for the message.
    """
    try:
        yield
    except _client_errors(place) as error:
        raise failure(place, error, what) from error


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
    with failures_named(place, "A file"):
        return backend(place).entry(place)


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
    with failures_named(folder, "A folder that can be listed"):
        return sorted(backend(folder).children(folder))


def files_below(folder: Place) -> Iterator[tuple[Place, int]]:
    """Yield the files in a folder and in its folders, with their sizes, in no stated order."""
    if isinstance(folder, Path):
        for path in folder.rglob("*"):
            if path.is_file():
                yield path, path.stat().st_size
        return
    with failures_named(folder, "A folder that can be listed"):
        for found in backend(folder).files(folder):
            yield found.place, found.size


def read(place: Place) -> bytes:
    """Return the content of a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if isinstance(place, Path):
        return place.read_bytes()
    with failures_named(place, "A file"):
        return bytes(backend(place).whole(place))


def read_into(place: RemotePath, start: int, buffer: Any) -> None:
    """Fill a buffer with the bytes of a file under a URL from `start`; long ones in pieces at once.

    Raises:
        FileEndsEarlyError: The file ends before the buffer is full.
        StorageError: The server fails.
    """
    view = memoryview(buffer).cast("B")

    def fill(offset: int) -> None:
        part = view[offset : offset + PIECE_BYTES]
        part[:] = read_ranges(place, [(start + offset, start + offset + len(part))])[0]

    offsets = range(0, len(view), PIECE_BYTES)
    for _ in in_order(fill, offsets, remote=len(offsets) > 1):
        pass


def read_ranges(place: RemotePath, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Return the bytes of ranges (start, stop) of a file under a URL; near ones are read as one.

    A body that is shorter than asked is asked for again, with exponential back-off and jitter.

    Raises:
        FileEndsEarlyError: The file ends before one of them does.
        StorageError: The server fails.
    """
    wanted = [(start, stop) for start, stop in ranges if stop > start]
    found: list[memoryview] = []
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, FIRST_WAIT_SECONDS * 2**attempt))
        found = _ranges(place, wanted)
        if all(
            len(part) == stop - start for part, (start, stop) in zip(found, wanted, strict=True)
        ):
            parts = iter(found)
            return [next(parts) if stop > start else memoryview(b"") for start, stop in ranges]
    short = next(
        f"{len(part)} bytes came from byte {start}, {stop - start} were asked for"
        for part, (start, stop) in zip(found, wanted, strict=True)
        if len(part) != stop - start
    )
    raise StorageError(
        f"{place} cannot be read: {short}, {ATTEMPTS} times. A server that answers whole was "
        f"expected. Run the command again later, or copy the file; what is done is kept."
    )


def open_file(place: Place) -> BinaryIO:
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
        partial = partial_path(place)
        partial.write_bytes(content)
        partial.replace(place)
        return
    with failures_named(place, "A place that can be written"):
        backend(place).put(place, content)


def delete(place: Place) -> None:
    """Remove a file, if it is there."""
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return
    with failures_named(place, "A file that can be deleted"):
        backend(place).delete(place)


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


def _ranges(place: RemotePath, wanted: Sequence[tuple[int, int]]) -> list[memoryview]:
    if not wanted:
        return []
    stop = max(stop for _, stop in wanted)
    try:
        with failures_named(place, f"The bytes up to {stop}"):
            found = backend(place).ranges(place, wanted)
    except StorageError as error:
        if "status code: 416" not in str(error):  # no range of the file: it is shorter than it was
            raise
        raise FileEndsEarlyError(place, entry(place).size, stop) from error
    if sum(map(len, found)) != sum(stop - start for start, stop in wanted):
        size = entry(place).size
        if size < stop:
            raise FileEndsEarlyError(place, size, stop)
    return found


def _client_errors(place: Place) -> tuple[type[Exception], ...]:
    return () if isinstance(place, Path) else backend(place).errors
