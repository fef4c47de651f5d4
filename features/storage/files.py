"""The few operations on files that this project needs, the same for local disk and URLs."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from features.partial import appearing
from features.storage.place import Place, RemotePath
from features.storage.remote import backend
from features.storage.requests import entry, read_into, tried

BUFFER_BYTES = 4 << 20


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
        if not folder.is_dir():
            return []
        with os.scandir(folder) as there:
            return sorted(
                (each.name, each.stat().st_size if each.is_file() else None) for each in there
            )
    what = "A folder that can be listed"
    return tried(folder, what, lambda server: sorted(server.children(folder)))


def files_below(folder: Place) -> Iterator[tuple[Place, int]]:
    """Yield the files in a folder and in its folders, with their sizes, in no stated order."""
    if isinstance(folder, Path):
        for path in folder.rglob("*"):
            if path.is_file():
                yield path, path.stat().st_size
        return
    what = "A folder that can be listed"
    for about in tried(folder, what, lambda server: list(server.files(folder))):
        yield about.place, about.size


def read(place: Place) -> bytes:
    """Return the content of a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if isinstance(place, Path):
        return place.read_bytes()
    return tried(place, "A file", lambda server: bytes(server.whole(place)))


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
    tried(place, "A place that can be written", lambda server: server.put(place, content))


def delete(place: Place) -> None:
    """Remove a file, if it is there."""
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return
    tried(place, "A file that can be deleted", lambda server: server.delete(place))


def zarr_store(folder: Place) -> Any:
    """Return what zarr opens: the path, or a store that reads a URL."""
    return folder if isinstance(folder, Path) else backend(folder).zarr(folder)


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
