"""What has to be on the disk before something else: after a power cut, nothing else is sure.

A file that was written and renamed may come back empty, and two renames in either order, unless
the file, and the folder that has its name, were synchronised in between.
"""

import errno
import itertools
import os
from pathlib import Path

NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)
"""What file systems answer that synchronise the names in a folder by themselves, or never."""


def synchronise(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: They cannot be written there; the error names the path.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in NOT_FOR_FOLDERS):
            error.filename = str(path)
            raise


def synchronise_all(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for each in path.rglob("*"):
            if not each.is_symlink():
                synchronise(each)
    synchronise(path)


def make_folder(path: Path) -> None:
    """Make a folder, and those it is in; where they are new, their names are on the disk then."""
    new = list(itertools.takewhile(lambda each: not each.is_dir(), (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        synchronise(folder.parent)
