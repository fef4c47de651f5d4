"""Files of repositories on the Hugging Face hub, read only: `hf://datasets/<owner>/<name>/<path>`."""

from collections.abc import Iterator, Sequence
from typing import Any

from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.utils import merge_offset_ranges
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError
from zarr.storage import FsspecStore

from features.errors import StorageError
from features.storage.place import RemotePath
from features.storage.remote import GAP_BYTES, Entry


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

    def ranges(self, place: RemotePath, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return the bytes of some ranges (start, stop), those near each other read as one."""
        starts, stops = map(list, zip(*ranges, strict=True))
        _, firsts, lasts = merge_offset_ranges(
            [place.path] * len(ranges), starts, stops, max_gap=GAP_BYTES, sort=True
        )
        with self._files.open(place.path, "rb", cache_type="none") as file:
            blocks = {}
            for first, last in zip(firsts, lasts, strict=True):
                file.seek(first)
                blocks[first, last] = memoryview(file.read(last - first))
        return [
            next(
                block[start - first : stop - first]
                for (first, last), block in blocks.items()
                if first <= start and stop <= last
            )
            for start, stop in ranges
        ]

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
        raise _read_only(place)

    def delete(self, place: RemotePath) -> None:
        """Refuse to write."""
        raise _read_only(place)

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


def _read_only(place: RemotePath) -> StorageError:
    return StorageError(
        f"{place} cannot be written: the hub is only read. A local folder, s3:// or gs:// was "
        f"expected. Correct `extract.store`."
    )
