"""Names for what is being written, so that any number of writers may share a folder.

A file or folder is made under a name that no other writer has, on this machine or another, and then
renamed; two writers of one thing write the same bytes, and the last rename wins. What a killed
writer leaves behind says by its name whose it was.
"""

import errno
import functools
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = re.compile(r"\..+\.(?P<place>[0-9a-f]{12})-(?P<pid>\d+)-[0-9a-f]{8}\.partial")
SECONDS_UNTIL_OLD = 24 * 3600
"""Nothing is written for as long as this; then its writer is gone, wherever it was."""


def partial_path(path: Path) -> Path:
    """Return a hidden name beside `path` that only this call will ever use."""
    writer = f"{_place()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{writer}.partial")


@contextmanager
def appearing(path: Path, *, beside: Path | None = None) -> Iterator[Path]:
    """Yield a name to write a file under; it becomes `path` if that succeeds, and goes if not.

    Args:
        path: What the file is called when it is whole.
        beside: The name until then is beside this one; beside `path` if not given.
    """
    partial = partial_path(beside or path)
    try:
        yield partial
        os.replace(partial, path)  # noqa: PTH105 - Path.replace is the same with a longer trace
    except BaseException:  # a full disk, above all: what is half-written would keep it full
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder; it becomes `path` if that succeeds, and goes if not.

    A folder that is there already is replaced, and stays whole until then. Of several writers the
    last one wins.
    """
    partial = partial_path(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace_folder(partial, path)
    except BaseException:  # a full disk, above all: what is half-written would keep it full
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace_folder(new: Path, path: Path) -> None:
    """Rename a folder over another, which no system call does where that one has files."""
    while True:
        try:
            new.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        old = partial_path(path)
        with suppress(FileNotFoundError):  # another writer was faster
            path.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that are gone have left in a folder.

    A writer of this machine is gone when its process is; one of another machine when it has not
    written for a day.
    """
    for path in folder.glob(".*.partial"):
        if (name := NAME.fullmatch(path.name)) and _is_gone(path, name["place"], int(name["pid"])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_gone(path: Path, place: str, pid: int) -> bool:
    if place != _place():
        try:
            return time.time() - path.stat().st_mtime > SECONDS_UNTIL_OLD
        except FileNotFoundError:  # renamed in this moment
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user, and alive
        pass
    return False


@functools.cache
def _place() -> str:
    """Name the processes whose numbers can be compared: one boot, one machine, one container."""
    parts = [socket.gethostname()]
    if (boot := Path("/proc/sys/kernel/random/boot_id")).is_file():
        parts += [boot.read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
