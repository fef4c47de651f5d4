"""Every error this project raises on purpose.

They live in `features` because it is the package all others may import.

A message says, in this order: what is wrong, with the value and the place; what was expected;
the command or setting that puts it right.
"""

import errno
import re


class SailError(Exception):
    """Base of the errors that are the user's to put right; the CLI prints them without a trace."""


def refused(error: OSError, who: str) -> str:
    """Say in words that the operating system refused something; `who` must be able to do it."""
    place = f" {error.filename}:" if error.filename else ""
    reason = " ".join(str(error.strerror or error).split())  # that of HDF5 has many lines
    return (
        f"The operating system refused:{place} {reason}. A place that {who} can "
        f"read and write was expected. {remedy_of(error)}; what was done is kept."
    )


def remedy_of(error: Exception) -> str:
    """Say what to do about an error of the operating system, also where a library words it."""
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors
        number = int(told[1])
    return REMEDIES.get(number or 0, "Check `run.dir` and the paths of the recipe")


_MAKE_ROOM = "Make room on the disk, or choose another with `run.dir`"
_RIGHTS = "Give this user the right to it, or choose another place"
_NETWORK = "Check the network and the address, and run the command again"
REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "Raise the largest size of a file (`ulimit -f`), or choose another disk",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "Choose a place on a disk that can be written",
    errno.ENOENT: "Correct the path, or put the file back",
    errno.ENOTDIR: "Correct the path: a part of it is a file",
    errno.EISDIR: "Correct the path: it is a folder",
    errno.EEXIST: "Choose another place, or delete what is there",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Correct the links: they lead in a circle",
    errno.EMFILE: "Raise the number of open files (`ulimit -n 4096`)",
    errno.ENFILE: "Close other programs: this machine has too many files open",
    errno.ENOMEM: "Free memory, or lower the batch sizes",
    errno.EAGAIN: "Wait for what else uses it, or raise the number of processes (`ulimit -u`)",
    errno.EIO: "Check the disk (`dmesg`): it cannot be read or written there",
    errno.ESTALE: "Mount the network disk again, and run the command again",
    errno.ECONNREFUSED: _NETWORK,
    errno.ECONNRESET: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
}
"""What to do about an error of the operating system, by its number."""


class FileError(SailError):
    """A file is not what it was taken for: damaged, of another kind, or too large."""


class ConfigError(SailError):
    """The run file, or an override on the command line, is not valid."""


class PlaceError(ConfigError, ValueError):
    """A path or URL cannot be used as a place."""


class StorageError(SailError):
    """A place under a URL cannot be reached, read or written, also after retries."""


class PlaceNotFoundError(StorageError, FileNotFoundError):
    """There is no file at the URL."""

    def __init__(self, place: object) -> None:
        super().__init__(
            f"There is no file {place}. It was expected there. Correct the address, or put the "
            f"file back."
        )


class FileEndsEarlyError(StorageError):
    """A file under a URL is shorter than the range that was asked for."""

    def __init__(self, place: object, size: int, stop: int) -> None:
        self.size = size
        super().__init__(
            f"{place} has {size} bytes. At least {stop} were expected. Put the whole file there."
        )


class SourceError(SailError):
    """A source is missing, cut off, or changed since it was indexed."""


class UnreadableError(SourceError):
    """A file of a source is damaged or cut off: nothing of it is used."""


class EncoderError(SailError):
    """A frozen encoder cannot be loaded, or does not give what the recipe asks for."""


class EncoderMissingError(EncoderError):
    """The files of an encoder are neither here nor to be had from the hub."""


class StoreError(SailError):
    """A feature store cannot be used as asked."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no feature store at the path."""

    def __init__(self, path: object) -> None:
        super().__init__(f"There is no feature store at {path}. Create it with `sail extract`.")


class StoreMismatchError(StoreError):
    """The store on disk is not the one the run describes."""

    def __init__(self, place: str, field: str, *, found: object, expected: object) -> None:
        super().__init__(
            f"{place} has {field} = {found!r}, but this run expects {expected!r}. "
            f"Give this run another `run.dir`, give the encoder another name in the recipe, "
            f"or delete {place} to compute it again."
        )


class StoreCorruptError(StoreError):
    """A file of a store is not what was written there."""

    def __init__(self, place: object, what: str) -> None:
        self.place = place
        self.what = what
        super().__init__(
            f"{place} is damaged: {what}. `sail verify` names all that is damaged in the store; "
            f"run `sail repair` to encode such chunks again."
        )


class LockedError(SailError):
    """Another process is at what only one may do at a time."""

    def __init__(self, what: str, holder: str, remedy: str) -> None:
        super().__init__(
            f"{what} by another process ({holder}). One at a time was expected. {remedy}"
        )


class ClusterError(SailError):
    """Workers are lost again and again, or the scheduler of a cluster cannot be reached."""


class CheckpointError(SailError):
    """A checkpoint is missing, incomplete, or from another head."""


class TrainingError(SailError):
    """The head cannot be trained with these settings on these stores."""


class EvaluationError(SailError):
    """A measure cannot be computed from what the run holds."""


class UnusableSplitError(EvaluationError):
    """A split has no row that a measure could use; other splits are measured."""
