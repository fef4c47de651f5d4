"""What the client of each kind of URL is asked for, and how its failures are told.

Credentials come from the environment: AWS_*, with AWS_ENDPOINT_URL for other servers that speak S3;
GOOGLE_*; HF_TOKEN.
"""

import asyncio
import functools
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote

import obstore
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError
from obstore.exceptions import BaseError, NotSupportedError
from obstore.store import GCSStore, HTTPStore, ObjectStore, S3Store
from zarr.abc.store import OffsetByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import FsspecStore
from zarr.storage import ObjectStore as ZarrObjectStore

from features.errors import PlaceNotFoundError, StorageError
from features.storage.place import Place, RemotePath, without_secrets
from features.storage.web import NoRangesError, WebError, address_of, asked

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
        return _Hub()
    return _Web() if place.has_escapes else _Objects()


def failure(place: RemotePath, error: Exception, what: str) -> StorageError:
    """Return the error to raise when a server refuses, or fails after all retries.

    Args:
        place: What was asked for.
        error: What the client says. Of its text only the reason is kept, without any address.
        what: What was expected.
    """
    if isinstance(error, FileNotFoundError):
        return PlaceNotFoundError(place)
    if isinstance(error, NotSupportedError | NoRangesError):
        return StorageError(
            f"{place} cannot be read by parts: its server sends whole files only. One that honours "
            f"Range requests was expected. Copy the files to local disk or S3, or let another "
            f"server serve them."
        )
    reason = str(error) if isinstance(error, WebError) else _reason(str(error))
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


def check_writable(place: Place) -> None:
    """Refuse to write where files are only read.

    Raises:
        StorageError: Saying where can be written.
    """
    if isinstance(place, RemotePath) and not place.can_be_written:
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


class _Objects:
    """S3 and Google Cloud Storage, by obstore; web servers have a client of their own."""

    errors: tuple[type[Exception], ...] = (BaseError, BrokenBody, OSError)

    def entry(self, place: RemotePath) -> Entry:
        key = _key(place)
        if len(key.encode()) > MAX_KEY_BYTES:
            raise FileNotFoundError(key)
        try:
            return _entry(place, obstore.head(_store(place), key))
        except ValueError as error:  # a name that no key can have
            raise FileNotFoundError(key) from error

    def whole(self, place: RemotePath) -> memoryview:
        found = obstore.get(_store(place), _key(place))
        return memoryview(_whole(found.bytes(), found.meta["size"]))

    def range(self, place: RemotePath, start: int, stop: int) -> memoryview:
        return memoryview(obstore.get_range(_store(place), _key(place), start=start, end=stop))

    def children(self, folder: RemotePath) -> Iterator[tuple[str, int | None]]:
        found = obstore.list_with_delimiter(_listable(folder), folder.key)
        for path in found["common_prefixes"]:
            yield path.rpartition("/")[2], None
        for entry in found["objects"]:
            yield entry["path"].rpartition("/")[2], entry["size"]

    def files(self, folder: RemotePath) -> Iterator[Entry]:
        root = RemotePath(folder.scheme, folder.bucket)
        for entries in obstore.list(_listable(folder), folder.key):
            for entry in entries:
                yield _entry(root / entry["path"], entry)

    def put(self, place: RemotePath, content: bytes) -> None:
        check_writable(place)
        obstore.put(_store(place), _key(place), content, use_multipart=False)

    def delete(self, place: RemotePath) -> None:
        check_writable(place)
        obstore.delete(_store(place), _key(place))

    def zarr(self, folder: RemotePath) -> Any:
        store = _ZarrStore(_store(folder, _key(folder)), read_only=True)
        store.folder = folder
        return store


class _Web(_Objects):
    """A web server. What it lists or takes is told as of the others: nothing."""

    errors = (WebError, BrokenBody, OSError)

    def entry(self, place: RemotePath) -> Entry:
        if len(_key(place).encode()) > MAX_KEY_BYTES:
            raise FileNotFoundError(str(place))
        headers = _asked("HEAD", place).headers
        version = headers.get("etag") or headers.get("last-modified") or ""
        if "content-length" not in headers:
            raise WebError("its server does not say how long it is")
        return Entry(place, int(headers["content-length"]), version)

    def whole(self, place: RemotePath) -> memoryview:
        return memoryview(_asked("GET", place).data)

    def range(self, place: RemotePath, start: int, stop: int) -> memoryview:
        answer = _asked("GET", place, range=f"bytes={start}-{stop - 1}")
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return memoryview(b"")
        if answer.status != HTTPStatus.PARTIAL_CONTENT:
            raise NoRangesError
        return memoryview(answer.data)[: stop - start]

    def zarr(self, folder: RemotePath) -> Any:
        store = _WebZarrStore(_store(folder, _key(folder)), read_only=True)
        store.folder = folder
        return store


def _asked(method: str, place: RemotePath, **headers: str) -> Any:
    wait = RETRY["backoff"]["init_backoff"].total_seconds()
    url = address_of(place.scheme, place.path)
    headers |= {"user-agent": CLIENT["user_agent"], "accept-encoding": "identity"}
    return asked(method, url, headers, retries=RETRY["max_retries"], backoff=wait)


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


class _WebZarrStore(_ZarrStore):
    """The same of a web server, by a client that asks before it follows a redirect."""

    async def exists(self, key: str) -> bool:
        return await self.get(key, default_buffer_prototype()) is not None

    async def _get(self, key: str, prototype: Any, byte_range: Any) -> Any:
        web = _Web()
        try:
            content = await asyncio.to_thread(web.whole, self.folder / key)
        except FileNotFoundError:
            return None
        except WebError as error:
            raise failure(self.folder / key, error, "A part of a Zarr store") from error
        return prototype.buffer.from_bytes(bytes(_part(content, byte_range)))


def _part(content: memoryview, wanted: Any) -> memoryview:
    """Return what zarr asks for of a file, which it does of shards only."""
    if isinstance(wanted, SuffixByteRequest):
        return content[-wanted.suffix :]
    if isinstance(wanted, OffsetByteRequest):
        return content[wanted.offset :]
    return content if wanted is None else content[wanted.start : wanted.end]


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


class _Hub:
    """The hub's own client, which retries by itself; a revision stands behind `@`."""

    # OSError, and that of the HTTP client, whichever this version of the hub uses.
    errors: tuple[type[Exception], ...] = HfHubHTTPError.__bases__

    def __init__(self) -> None:
        self._files = HfFileSystem()  # one per thread: it keeps them itself

    def entry(self, place: RemotePath) -> Entry:
        about = self._files.info(place.path)
        if about["type"] != "file":
            raise FileNotFoundError(str(place))
        return _hub_entry(place, about)

    def whole(self, place: RemotePath) -> memoryview:
        with self._files.open(place.path, "rb", cache_type="none") as file:
            return memoryview(file.read(file.size))

    def range(self, place: RemotePath, start: int, stop: int) -> memoryview:
        with self._files.open(place.path, "rb", cache_type="none") as file:
            file.seek(start)
            return memoryview(file.read(stop - start))

    def children(self, folder: RemotePath) -> Iterator[tuple[str, int | None]]:
        for about in self._listed(folder):
            is_file = about["type"] == "file"
            yield about["name"].rpartition("/")[2], about["size"] if is_file else None

    def files(self, folder: RemotePath) -> Iterator[Entry]:
        for about in self._listed(folder):
            place = folder / about["name"].rpartition("/")[2]
            if about["type"] == "file":
                yield _hub_entry(place, about)
            else:
                yield from self.files(place)

    def put(self, place: RemotePath, content: bytes) -> None:  # noqa: ARG002
        check_writable(place)

    def delete(self, place: RemotePath) -> None:
        check_writable(place)

    def zarr(self, folder: RemotePath) -> Any:
        files = AsyncFileSystemWrapper(self._files, asynchronous=True)
        return FsspecStore(files, read_only=True, path=folder.path)

    def _listed(self, folder: RemotePath) -> list[dict[str, Any]]:
        try:
            listed: list[Any] = self._files.ls(folder.path, detail=True)
        except FileNotFoundError:
            return []
        return listed


def _hub_entry(place: RemotePath, about: dict[str, Any]) -> Entry:
    large = about.get("lfs") or {}
    version = large.get("sha256") or about.get("blob_id") or ""
    return Entry(place, about["size"], str(version))
