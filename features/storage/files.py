"""The few operations on files that this project needs, the same for local disk and URLs."""

import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath, as_place, local_path
from features.storage.remote import backend
from features.storage.requests import entry, read_into, tried
from features.storage.synchronise import make_folder, synchronise, synchronise_all

NAME = re.compile(r"\..+\.(?P<place>[0-9a-f]{12})-(?P<pid>\d+)-[0-9a-f]{8}\.partial")
SECONDS_UNTIL_OLD = 24 * 3600
"""Nothing is written for as long as this; then its writer is gone, wherever it was."""


def partial_path(path: Path) -> Path:
    """Return a hidden name beside `path` that only this call will ever use."""
    writer = f"{machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{writer}.partial")


@contextmanager
def appearing(
    path: Path, *, beside: Path | None = None, after: Iterable[Path] = (), stays: bool = True
) -> Iterator[Path]:
    """Yield a name to write a file under; it becomes `path` if that succeeds, and goes if not.

    The content is on the disk before it gets its name: also after a power cut it is whole.

    Args:
        path: What the file is called when it is whole.
        beside: The name until then is beside this one; beside `path` if not given.
        after: Folders, the names in which are on the disk before that of the file.
        stays: Whether the file is still there after a power cut. It may be done without where it
            is made again if it is not, which is faster.
    """
    partial = partial_path(beside or path)
    try:
        yield partial
        for each in (partial, *after):
            synchronise(each)
        os.replace(partial, path)  # noqa: PTH105 - Path.replace is the same with a longer trace
        if stays:
            synchronise(path.parent)
    except BaseException as error:  # a full disk, above all: what is left would keep it full
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        _name(error, path)
        raise


def _name(error: BaseException, path: Path) -> None:
    """Let an error of the system say what could not be written: that of `write` does not."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder; it becomes `path` if that succeeds, and goes if not.

    A folder that is there already is replaced, and stays whole until then. Of several writers the
    last one wins. Afterwards the folder is on the disk, under its name.
    """
    partial = partial_path(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        synchronise_all(partial)
        _replace_folder(partial, path)
        synchronise(path.parent)
    except BaseException as error:  # a full disk, above all: what is left would keep it full
        shutil.rmtree(partial, ignore_errors=True)
        _name(error, path)
        raise


def _replace_folder(new: Path, path: Path) -> None:
    """Rename a folder over another, which no system call does where that one has files."""
    while not _renamed(new, path):
        old = partial_path(path)
        with suppress(FileNotFoundError):  # another writer was faster
            path.rename(old)
        try:
            is_done = _renamed(new, path)
        except OSError:
            with suppress(OSError):
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if is_done:
            return


def _renamed(new: Path, path: Path) -> bool:
    """Rename a folder, unless there is one with files."""
    try:
        new.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


@contextmanager
def without_empty_folders(path: Path) -> Iterator[None]:
    """Remove the folders above a path that were made meanwhile and have nothing in them."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def remove_leftovers(folder: Place) -> None:
    """Remove what writers that are gone have left in a folder; under a URL they leave nothing.

    A writer of this machine is gone when its process is; one of another machine when it has not
    written for a day.
    """
    if not isinstance(folder, Path):
        return
    for path in folder.glob(".*.partial"):
        if (name := NAME.fullmatch(path.name)) and _is_gone(path, name["place"], int(name["pid"])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_gone(path: Path, place: str, pid: int) -> bool:
    if place != machine():
        try:
            return time.time() - path.stat().st_mtime > SECONDS_UNTIL_OLD
        except FileNotFoundError:  # renamed in this moment
            return False
    return process_is_gone(pid)


def process_is_gone(pid: int) -> bool:
    """Return whether there is no such process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user, and alive
        pass
    return False


@functools.cache
def machine() -> str:
    """Name the processes whose numbers can be compared: one boot, one machine, one container."""
    parts = [socket.gethostname()]
    if (boot := Path("/proc/sys/kernel/random/boot_id")).is_file():
        parts += [boot.read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


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
            return sorted((each.name, _size(each)) for each in there)
    what = "A folder that can be listed"
    return tried(folder, what, lambda server: sorted(server.children(folder)))


def _size(entry: os.DirEntry[str]) -> int | None:
    """Return the bytes of what is no folder; none of a link that leads nowhere, or in a circle."""
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except OSError:
        return 0


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
        with opened(place) as file:
            return file.read()
    return tried(place, "A file", lambda server: bytes(server.whole(place)))


def opened(path: Path) -> io.BufferedReader:
    """Open a local file for reading, and nothing else: a FIFO would keep its reader for ever.

    Raises:
        OSError: It is missing, or no file.
    """
    file = open(path, "rb", opener=without_waiting)  # noqa: SIM115 - it has an opener
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file, but a FIFO or a device", str(path))
    return file


def without_waiting(path: str, flags: int) -> int:
    """Open a file as `open` does, but wait for no other end of a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def open_file(place: Place) -> io.BufferedReader:
    """Open a file for reading; one under a URL is read by ranges.

    Raises:
        FileNotFoundError: There is none.
    """
    if isinstance(place, Path):
        return opened(place)
    return io.BufferedReader(_RangedFile(place), BUFFER_BYTES)


@contextmanager
def folder_beside(place: Place) -> Iterator[Path]:
    """Yield a new local folder, in a folder that is local on the same disk; it goes at the end."""
    if isinstance(place, RemotePath):
        with tempfile.TemporaryDirectory(prefix="sail-") as folder:
            yield Path(folder)
        return
    partial = partial_path(place / "growth")
    try:
        partial.mkdir()
        yield partial
    finally:  # also after a full disk, above all: what is half-written would keep it full
        shutil.rmtree(partial, ignore_errors=True)


def move(file: Path, place: Place) -> None:
    """Give a file of the same disk its place, or copy it to a URL; it appears as a whole."""
    if isinstance(place, RemotePath):
        write(place, file.read_bytes())
        return
    make_folder(place.parent)
    synchronise(file)
    file.replace(place)
    synchronise(place.parent)


def write(place: Place, content: bytes) -> None:
    """Write a file: it appears under its name as a whole, or not at all."""
    if isinstance(place, Path):
        make_folder(place.parent)
        with appearing(place) as partial:
            partial.write_bytes(content)
        return
    tried(place, "A place that can be written", lambda server: server.put(place, content))


def write_json(place: Place, document: object, *, allow_nan: bool = True) -> None:
    """Write a JSON document, indented: it appears under its name as a whole, or not at all."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=allow_nan)
    write(place, f"{text}\n".encode())


def delete(place: Place) -> None:
    """Remove a file, if it is there."""
    if isinstance(place, Path):
        with suppress(FileNotFoundError):
            place.unlink()
            synchronise(place.parent)
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


_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")


def matching_places(pattern: str) -> list[Place]:
    """Return the files that match a pattern, sorted by name.

    Folders that are there as they are written are no pattern, as `2019 [1]` and `{a,b}`. What
    braces stand for is listed in the order in which they say it, and each must match.

    Raises:
        StorageError: A place under a URL cannot be listed.
    """
    folder, rest = _literal_part(pattern)
    plain = [folder + item for item in expanded(rest)]
    fixed = [as_place(item) for item in plain if not _is_glob(item)]
    there = dict(zip(fixed, in_order(is_file, fixed, at=fixed), strict=True))
    found: list[Place] = []
    for item in plain:
        place = as_place(item)
        if place in there:
            matches: list[Place] = [place] if there[place] else []
        elif isinstance(place, RemotePath):
            matches = _remote_matches(place)
        else:
            matches = _local_matches(place)
        if not matches:
            raise FileNotFoundError(item)
        found += matches
    return found


def _literal_part(pattern: str) -> tuple[str, str]:
    """Split a pattern behind the local folders that are there as they are written."""
    if "://" in pattern or not _BRACES.search(pattern):
        return "", pattern
    parts = pattern.split("/")
    for stop in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:stop])
        if "{" in folder and local_path(folder).is_dir():
            return f"{folder}/", "/".join(parts[stop:])
    return "", pattern


def expanded(pattern: str) -> Iterator[str]:
    """Yield what the braces of a pattern stand for: `{a,b}`, or `{08..11}` with its zeros."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    values: Iterator[str] | Sequence[str] = (
        (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        if words is None
        else words.split(",")
    )
    for value in values:
        yield from expanded(pattern[: match.start()] + value + pattern[match.end() :])


def _is_glob(pattern: str) -> bool:
    signs = "*[" if pattern.startswith(("http://", "https://")) else "*?["
    return any(sign in pattern for sign in signs)


def _local_matches(pattern: Path) -> list[Place]:
    """Return the files that fit; what is there as it is written is no pattern, as `2019 [1]`."""
    if pattern.is_file():
        return [pattern]
    folder = next(parent for parent in pattern.parents if parent.is_dir())
    rest = str(pattern.relative_to(folder))
    names = glob.glob(rest, root_dir=folder, recursive=True)  # noqa: PTH207 - leaves out `.hidden`
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _remote_matches(pattern: RemotePath) -> list[Place]:
    parts = pattern.path.split("/")
    fixed = list(itertools.takewhile(lambda part: not _is_glob(part), parts))
    folder = RemotePath(pattern.scheme, "/".join(fixed))
    rest = parts[len(fixed) :]
    if len(rest) == 1 and rest != ["**"]:
        names = [[name] for name, size in children(folder) if size is not None]
    else:
        names = [str(place).split("/")[2 + len(fixed) :] for place, _ in files_below(folder)]
    return sorted(folder / "/".join(parts) for parts in names if _fits(parts, rest))


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path fits a pattern; `*` leaves out names that begin with `.`."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[start:], pattern[1:]) for start in range(len(names) + 1))
    if not names or (names[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])
