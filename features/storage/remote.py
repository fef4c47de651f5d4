"""What answers for each kind of URL: obstore for S3, Google Cloud and HTTP, the hub's own client.

obstore retries what is dropped, cut short or answered with 5xx, with exponential back-off and
jitter, and goes on within a body where it broke off. Credentials come from the environment: AWS_*,
with AWS_ENDPOINT_URL for other servers that speak S3; GOOGLE_*; HF_TOKEN.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError
from obstore.store import GCSStore, HTTPStore, ObjectStore, S3Store
from zarr.storage import ObjectStore as ZarrObjectStore

from features.errors import PlaceNotFoundError, StorageError
from features.storage.place import Place, RemotePath, without_secrets

RETRIES = 8
GAP_BYTES = 1 << 20
"""Ranges nearer to each other than this are read as one."""
MAX_REASON = 300
RETRY: Any = {
    "max_retries": RETRIES,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
}
CLIENT: Any = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(minutes=10),
    "user_agent": "sail",
}


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

    def ranges(self, place: RemotePath, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return the bytes of some ranges (start, stop), those near each other read as one."""

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


def backend(place: RemotePath) -> Backend:
    """Return what answers for a URL."""
    if place.scheme == "hf":
        from features.storage.hub import Hub

        return Hub()
    return Objects()


def failure(place: Place, error: Exception, what: str) -> StorageError:
    """Return the error to raise when a server refuses, or fails after all retries.

    Args:
        place: What was asked for.
        error: What the client says. Of its text only the reason is kept, without any address.
        what: What was expected.
    """
    if isinstance(error, FileNotFoundError):
        return PlaceNotFoundError(place)
    reason = _reason(str(error))
    return StorageError(
        f"{place} cannot be used: {reason}. {what} was expected. Check the address, the network "
        f"and the credentials in the environment, then run the command again; what is done is kept."
    )


def _reason(text: str) -> str:
    """Return what a client complains of, without the address and the page that came with it."""
    line = text.split("\n", 1)[0]
    retries = re.search(r"after \d+ retries", line)
    told = without_secrets(line.rpartition(" - ")[2].partition(": <")[0])[:MAX_REASON]
    return f"{told} ({retries[0]})" if retries else told


class Objects:
    """S3, Google Cloud Storage and HTTP, by obstore."""

    errors: tuple[type[Exception], ...] = (BaseError, OSError)

    def entry(self, place: RemotePath) -> Entry:
        """Return the size and version of a file."""
        return _entry(place, obstore.head(_store(place), _key(place)))

    def whole(self, place: RemotePath) -> memoryview:
        """Return the content of a file."""
        return memoryview(obstore.get(_store(place), _key(place)).bytes())

    def ranges(self, place: RemotePath, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return the bytes of some ranges (start, stop), those near each other read as one."""
        starts, stops = zip(*ranges, strict=True)
        found = obstore.get_ranges(
            _store(place), _key(place), starts=starts, ends=stops, coalesce=GAP_BYTES
        )
        return [memoryview(part) for part in found]

    def children(self, folder: RemotePath) -> Iterator[tuple[str, int | None]]:
        """Yield the names of what is in a folder, and the size of what is a file."""
        found = obstore.list_with_delimiter(_listable(folder), folder.key)
        for path in found["common_prefixes"]:
            yield path.rpartition("/")[2], None
        for entry in found["objects"]:
            yield entry["path"].rpartition("/")[2], entry["size"]

    def files(self, folder: RemotePath) -> Iterator[Entry]:
        """Yield the files in a folder, and in the folders in it."""
        root = RemotePath(folder.scheme, folder.bucket)
        for entries in obstore.list(_listable(folder), folder.key):
            for entry in entries:
                yield _entry(root / entry["path"], entry)

    def put(self, place: RemotePath, content: bytes) -> None:
        """Write a file as a whole: it appears when the server has all of it."""
        obstore.put(_store(place), _key(place), content, use_multipart=False)

    def delete(self, place: RemotePath) -> None:
        """Remove a file."""
        obstore.delete(_store(place), _key(place))

    def zarr(self, folder: RemotePath) -> Any:
        """Return a folder as a Zarr store that is read only."""
        store = _ZarrStore(_connected(folder.scheme, folder.bucket, _key(folder)), read_only=True)
        store.folder = folder
        return store


class _ZarrStore(ZarrObjectStore[ObjectStore]):
    """What zarr reads through; failures name the place, as everywhere."""

    folder: RemotePath

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().get(key, *arguments, **options)
        except BaseError as error:
            raise failure(self.folder / key, error, "A part of a Zarr store") from error


def _store(place: RemotePath) -> ObjectStore:
    return _connected(place.scheme, place.bucket, "")


def _listable(folder: RemotePath) -> ObjectStore:
    if not folder.can_be_listed:
        raise StorageError(
            f"The files of {folder} cannot be listed: a web server has no listing. Names were "
            f"expected, as in `shard-{{00000..00010}}.tar`. Name the files, or use s3://, gs:// or "
            f"hf://."
        )
    return _store(folder)


@functools.lru_cache(maxsize=64)
def _connected(scheme: str, bucket: str, prefix: str) -> ObjectStore:
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        client: Any = {**CLIENT, "allow_http": endpoint.startswith("http://")}
        return S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=RETRY)
    if scheme == "gs":
        return GCSStore(bucket, prefix=prefix or None, client_options=CLIENT, retry_config=RETRY)
    client = {**CLIENT, "allow_http": scheme == "http"}
    url = f"{scheme}://{bucket}/{prefix}"
    return HTTPStore(url, client_options=client, retry_config=RETRY)


def _key(place: RemotePath) -> str:
    """Return the key; the paths of web addresses are written with escapes, keys are not."""
    return unquote(place.key) if place.scheme in ("http", "https") else place.key


def _entry(place: RemotePath, about: Any) -> Entry:
    version = about["e_tag"] or about["last_modified"].isoformat()
    return Entry(place, about["size"], version)
