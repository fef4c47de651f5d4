"""S3, Google Cloud Storage and HTTP, by obstore.

obstore retries what is dropped, cut short or answered with 5xx, with exponential back-off and
jitter, and goes on within a body where it broke off.
"""

import asyncio
import functools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError
from obstore.store import GCSStore, HTTPStore, ObjectStore, S3Store
from zarr.storage import ObjectStore as ZarrObjectStore

from features.errors import StorageError
from features.storage.place import RemotePath
from features.storage.remote import (
    ATTEMPTS,
    BrokenBody,
    Entry,
    check_writable,
    failure,
    is_broken_body,
    seconds_before,
)

MAX_KEY_BYTES = 1024
"""No longer ones can be, on S3 and Google Cloud."""
RETRIES = 8
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


class Objects:
    """S3, Google Cloud Storage and HTTP, by obstore."""

    errors: tuple[type[Exception], ...] = (BaseError, BrokenBody, OSError)

    def entry(self, place: RemotePath) -> Entry:
        """Return the size and version of a file."""
        key = _key(place)
        if len(key.encode()) > MAX_KEY_BYTES:
            raise FileNotFoundError(key)
        try:
            return _entry(place, obstore.head(_store(place), key))
        except ValueError as error:  # a name that no key can have
            raise FileNotFoundError(key) from error

    def whole(self, place: RemotePath) -> memoryview:
        """Return the content of a file."""
        found = obstore.get(_store(place), _key(place))
        return memoryview(_whole(found.bytes(), found.meta["size"]))

    def range(self, place: RemotePath, start: int, stop: int) -> memoryview:
        """Return the bytes of a file from `start` to `stop`, fewer if the server sends fewer."""
        return memoryview(obstore.get_range(_store(place), _key(place), start=start, end=stop))

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
        check_writable(place)
        obstore.put(_store(place), _key(place), content, use_multipart=False)

    def delete(self, place: RemotePath) -> None:
        """Remove a file."""
        check_writable(place)
        obstore.delete(_store(place), _key(place))

    def zarr(self, folder: RemotePath) -> Any:
        """Return a folder as a Zarr store that is read only."""
        store = _ZarrStore(_store(folder, _key(folder)), read_only=True)
        store.folder = folder
        return store


class _ZarrStore(ZarrObjectStore[ObjectStore]):
    """What zarr reads through; failures name the place, as everywhere."""

    folder: RemotePath

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        attempt = 0
        while True:
            try:
                return await self._get(key, prototype, byte_range)
            except (BaseError, BrokenBody) as error:
                attempt += 1
                if attempt == ATTEMPTS or not is_broken_body(error):
                    raise failure(self.folder / key, error, "A part of a Zarr store") from error
                await asyncio.sleep(seconds_before(attempt))

    async def _get(self, key: str, prototype: Any, byte_range: Any) -> Any:
        if byte_range is not None:
            return await super().get(key, prototype, byte_range)
        try:
            found = await obstore.get_async(self.store, key)
            content = _whole(await found.bytes_async(), found.meta["size"])
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(content)


def _whole(content: Any, size: int) -> Any:
    if len(content) != size:
        raise BrokenBody(f"{len(content)} bytes came of a body of {size}")
    return content


def _store(place: RemotePath, prefix: str = "") -> ObjectStore:
    return _connected(place.scheme, place.bucket, prefix, _s3_endpoint())


def _s3_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def _listable(folder: RemotePath) -> ObjectStore:
    if not folder.can_be_listed:
        raise StorageError(
            f"The files of {folder} cannot be listed: a web server has no listing. Names were "
            f"expected, as in `shard-{{00000..00010}}.tar`. Name the files, or use s3://, gs:// or "
            f"hf://."
        )
    return _store(folder)


@functools.lru_cache(maxsize=64)
def _connected(scheme: str, bucket: str, prefix: str, s3_endpoint: str) -> ObjectStore:
    is_plain = s3_endpoint.startswith("http://") if scheme == "s3" else scheme == "http"
    client: Any = {**CLIENT, "allow_http": True} if is_plain else CLIENT
    if scheme == "s3":
        return S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=RETRY)
    if scheme == "gs":
        return GCSStore(bucket, prefix=prefix or None, client_options=client, retry_config=RETRY)
    return HTTPStore(f"{scheme}://{bucket}/{prefix}", client_options=client, retry_config=RETRY)


def _key(place: RemotePath) -> str:
    """Return the key; the paths of web addresses are written with escapes, keys are not."""
    return unquote(place.key) if place.has_escapes else place.key


def _entry(place: RemotePath, about: Any) -> Entry:
    version = about["e_tag"] or about["last_modified"].isoformat()
    return Entry(place, about["size"], version)
