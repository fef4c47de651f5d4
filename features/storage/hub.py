"""Files of repositories on the Hugging Face hub, read only: `hf://datasets/<owner>/<name>/<path>`."""

from collections.abc import Iterator
from typing import Any

from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError
from zarr.storage import FsspecStore

from features.storage.place import RemotePath
from features.storage.remote import Entry, check_writable


class Hub:
    """The hub's own client, which retries by itself; a revision stands behind `@`."""

    # OSError, and that of the HTTP client, whichever this version of the hub uses.
    errors: tuple[type[Exception], ...] = HfHubHTTPError.__bases__

    def __init__(self) -> None:
        self._files = HfFileSystem()  # one per thread: it keeps them itself

    def entry(self, place: RemotePath) -> Entry:
        """Return the size and version of a file."""
        about = self._files.info(place.path)
        if about["type"] != "file":
            raise FileNotFoundError(str(place))
        return _entry(place, about)

    def whole(self, place: RemotePath) -> memoryview:
        """Return the content of a file."""
        with self._files.open(place.path, "rb", cache_type="none") as file:
            return memoryview(file.read(file.size))

    def range(self, place: RemotePath, start: int, stop: int) -> memoryview:
        """Return the bytes of a file from `start` to `stop`, fewer if the server sends fewer."""
        with self._files.open(place.path, "rb", cache_type="none") as file:
            file.seek(start)
            return memoryview(file.read(stop - start))

    def children(self, folder: RemotePath) -> Iterator[tuple[str, int | None]]:
        """Yield the names of what is in a folder, and the size of what is a file."""
        for about in self._listed(folder):
            is_file = about["type"] == "file"
            yield about["name"].rpartition("/")[2], about["size"] if is_file else None

    def files(self, folder: RemotePath) -> Iterator[Entry]:
        """Yield the files in a folder, and in the folders in it."""
        for about in self._listed(folder):
            place = folder / about["name"].rpartition("/")[2]
            if about["type"] == "file":
                yield _entry(place, about)
            else:
                yield from self.files(place)

    def put(self, place: RemotePath, content: bytes) -> None:  # noqa: ARG002
        """Refuse to write."""
        check_writable(place)

    def delete(self, place: RemotePath) -> None:
        """Refuse to write."""
        check_writable(place)

    def zarr(self, folder: RemotePath) -> Any:
        """Return a folder as a Zarr store that is read only."""
        files = AsyncFileSystemWrapper(self._files, asynchronous=True)
        return FsspecStore(files, read_only=True, path=folder.path)

    def _listed(self, folder: RemotePath) -> list[dict[str, Any]]:
        try:
            listed: list[Any] = self._files.ls(folder.path, detail=True)
        except FileNotFoundError:
            return []
        return listed


def _entry(place: RemotePath, about: dict[str, Any]) -> Entry:
    large = about.get("lfs") or {}
    version = large.get("sha256") or about.get("blob_id") or ""
    return Entry(place, about["size"], str(version))
