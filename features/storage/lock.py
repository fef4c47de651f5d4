"""Locks that keep other processes out, and end with the process that holds them.

A lock is a file under `flock`, in which its holders say who they are. It goes with the last of
them; of one that was killed the file may stay, and holds nobody up. Over a network file system the
kernel asks the server. Where that has no locks, or the folder cannot be written, nobody is kept
out: the users of such a place see to that themselves.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from features.errors import LockedError
from features.storage.files import machine, process_is_gone, without_empty_folders
from features.storage.synchronise import make_folder

SECONDS_BETWEEN_LOOKS = 0.1
NEVER = (0, 0)
WITHOUT_LOCKS = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
}


@contextmanager
def locked(
    path: Path,
    what: str,
    *,
    shared: bool = False,
    remedy: str = "Wait for it, or stop it.",
    wait: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: File of the lock; its folder is made, and goes again if nothing else is in it.
        what: What others cannot do meanwhile, as in "runs/demo/align is being written".
        shared: Whether others may hold it too, who also share it.
        remedy: What one can do who does not get it.
        wait: Called again and again, with the words of the error, until the lock is free; without
            it the error is raised at once.

    Raises:
        LockedError: Others hold it.
    """
    with without_empty_folders(path):
        before = _times(path.parent)
        file = _take(path, what, shared=shared, remedy=remedy, wait=wait)
        held = _times(path.parent)
        try:
            yield
        finally:
            if file is not None:
                is_unchanged = _times(path.parent)[1] == held[1]
                _give_back(path, file, shared=shared)
                if is_unchanged and before != NEVER:  # one that found nothing to do leaves no trace
                    with suppress(OSError):
                        os.utime(path.parent, ns=before)


def _take(
    path: Path,
    what: str,
    *,
    shared: bool,
    remedy: str,
    wait: Callable[[str], None] | None,
) -> int | None:
    """Return the open file of the lock, None where there are no locks."""
    while True:
        file = None
        try:
            file = _opened(path)
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_at(path, file):
                _sign(file, shared=shared)
                return file
            os.close(file)  # the one who held it has removed it meanwhile
        except OSError as error:
            is_held = file is not None and isinstance(error, BlockingIOError)
            holder = _holder(file) if file is not None and is_held else ""
            if file is not None:
                os.close(file)
            if not is_held and error.errno not in WITHOUT_LOCKS:
                raise
            if not is_held:
                return None
            taken = LockedError(what, holder, remedy)
            if wait is None:
                raise taken from None
            wait(str(taken))
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _opened(path: Path) -> int:
    """Open the file of a lock; another process may just be removing its folder, as empty."""
    while True:
        make_folder(path.parent)
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _times(folder: Path) -> tuple[int, int]:
    """Return when a folder was read and changed last."""
    try:
        status = folder.stat()
    except OSError:  # there is none
        return NEVER
    return status.st_atime_ns, status.st_mtime_ns


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _sign(file: int, *, shared: bool) -> None:
    """Write down who holds the lock; those who share it write below one another."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": machine(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    with suppress(OSError):  # a full disk: the lock holds without it
        if not shared:
            os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_END)
        os.write(file, f"{json.dumps(holder)}\n".encode())


def _holder(file: int) -> str:
    """Say who holds a lock, as far as its file tells."""
    for line in reversed(os.pread(file, 1 << 16, 0).decode(errors="replace").splitlines()):
        with suppress(ValueError, KeyError, TypeError):
            holder = json.loads(line)
            pid = int(holder["pid"])
            if holder["machine"] != machine() or not process_is_gone(pid):
                return f"process {pid} on {holder['host']}, since {holder['since']}"
    return "which has not said who it is"


def _give_back(path: Path, file: int, *, shared: bool) -> None:
    """Remove the file, unless others share the lock, and let go of it."""
    try:
        if shared:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, file):
            path.unlink()
    except OSError:  # others share it, or the disk is gone
        pass
    finally:
        os.close(file)
