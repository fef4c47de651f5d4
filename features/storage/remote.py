"""What the client of each kind of URL is asked for, and how its failures are told.

Credentials come from the environment: AWS_*, with AWS_ENDPOINT_URL for other servers that speak S3;
GOOGLE_*; HF_TOKEN.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from obstore.exceptions import NotSupportedError

from features.errors import PlaceNotFoundError, StorageError
from features.storage.place import RemotePath, without_secrets

ATTEMPTS = 5
"""At what obstore does not retry: bodies that are too short, or those of errors."""
FIRST_WAIT_SECONDS = 0.2
MAX_REASON = 300
METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal")
"""Where machines in the cloud ask for their credentials, if none are given."""


@dataclass(frozen=True)
class Entry:
    """What a listing says of a file."""

    place: RemotePath
    size: int
    version: str
    """Changes when the content does: the ETag, or a hash."""


@runtime_checkable
class Backend(Protocol):
    """The operations that a kind of URL has."""

    errors: tuple[type[Exception], ...]
    """What its client raises."""

    def entry(self, place: RemotePath) -> Entry:
        """Return the size and version of a file."""

    def whole(self, place: RemotePath) -> memoryview:
        """Return the content of a file."""

    def range(self, place: RemotePath, start: int, stop: int) -> memoryview:
        """Return the bytes of a file from `start` to `stop`, fewer if the server sends fewer."""

    def children(self, folder: RemotePath) -> Iterator[tuple[str, int | None]]:
        """Yield the names of what is in a folder, and the size of what is a file."""

    def files(self, folder: RemotePath) -> Iterator[Entry]:
        """Yield the files in a folder, and in the folders in it."""

    def put(self, place: RemotePath, content: bytes) -> None:
        """Write a file as a whole."""

    def delete(self, place: RemotePath) -> None:
        """Remove a file."""

    def zarr(self, folder: RemotePath) -> Any:
        """Return a folder as a Zarr store that is read only."""


class BrokenBody(Exception):  # noqa: N818 - never seen: it is tried again, then worded
    """A body is shorter than the server said."""


def backend(place: RemotePath) -> Backend:
    """Return what answers for a URL."""
    if place.scheme == "hf":
        from features.storage.hub import Hub

        return Hub()
    from features.storage.objects import Objects

    return Objects()


def failure(place: RemotePath, error: Exception, what: str) -> StorageError:
    """Return the error to raise when a server refuses, or fails after all retries.

    Args:
        place: What was asked for.
        error: What the client says. Of its text only the reason is kept, without any address.
        what: What was expected.
    """
    if isinstance(error, FileNotFoundError):
        return PlaceNotFoundError(place)
    if isinstance(error, NotSupportedError):
        return StorageError(
            f"{place} cannot be read by parts: its server sends whole files only. One that honours "
            f"Range requests was expected. Copy the files to local disk or S3, or let another "
            f"server serve them."
        )
    reason = _reason(str(error))
    return StorageError(
        f"{place} cannot be used: {reason}. {what} was expected. Check the address, the network "
        f"and the credentials in the environment, then run the command again; what is done is kept."
    )


def is_broken_body(error: Exception) -> bool:
    """Return whether a body broke off where obstore does not go on by itself, as in an error's."""
    return isinstance(error, BrokenBody) or "request or response body error" in str(error)


def seconds_before(attempt: int) -> float:
    """Return how long to wait before another attempt: exponential back-off with jitter."""
    return random.uniform(0, FIRST_WAIT_SECONDS * 2**attempt)


def check_writable(place: RemotePath) -> None:
    """Refuse to write where files are only read.

    Raises:
        StorageError: Saying where can be written.
    """
    if not place.can_be_written:
        raise StorageError(
            f"{place} cannot be written: {place.scheme}:// is only read. A local folder, s3:// or "
            f"gs:// was expected. Correct `extract.store`."
        )


def _reason(text: str) -> str:
    """Return what a client complains of, without the address and the page that came with it."""
    line = text.split("\n", 1)[0]
    if any(server in line for server in METADATA_SERVERS):
        return (
            "the environment has no credentials, and this is no machine in the cloud that has its "
            "own (AWS_SKIP_SIGNATURE=true reads a public bucket without)"
        )
    retries = re.search(r"after \d+ retries", line)
    told = without_secrets(line.rpartition(" - ")[2].partition(": <")[0])[:MAX_REASON].rstrip(": ")
    return f"{told} ({retries[0]})" if retries else told
