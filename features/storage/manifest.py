"""What a store says of its own files, so that a reader knows whether a file is what was written.

A manifest is a Zarr group of one file, `manifest/zarr.json`, whose attributes hold

* `metadata`: the sha256 of each `zarr.json` that it speaks for (`digest_of`), by its path in the
  store. That of a store speaks for the rows, that of a column for the column and its encoder.
* `arrays`: for each row array the `bytes` and the `crc32` (of zlib) of each of its files, in
  order. A crc32c would be the same for all files, since they end in theirs;
* `next`: while a store grows, both as they will be: then a file may be either;
* `sha256`: of the manifest itself.

It is one file, so that it is replaced as a whole.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from features.errors import StoreCorruptError
from features.storage.chunks import whole_file
from features.storage.files import appearing, is_file, write
from features.storage.place import Place
from features.storage.synchronise import make_folder

FILE = "manifest/zarr.json"
METADATA = "zarr.json"
METADATA_BYTES = 256 << 20
"""More than the manifest of a billion rows."""
Contents = dict[str, Any]
"""`metadata` and `arrays` of a manifest."""


class File(NamedTuple):
    """What a manifest says of a file of a row array; no bytes: there is no file."""

    bytes: int
    crc32: int


def read_metadata(place: Place, kind: str | None = None) -> dict[str, Any]:
    """Read a `zarr.json`.

    Args:
        place: Where it is.
        kind: `group` or `array`, if it must be one of them.

    Raises:
        StoreCorruptError: It is missing, or not such a document.
    """
    content = whole_file(place, METADATA_BYTES)
    if content is None:
        raise StoreCorruptError(place, "the file is missing")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(place, f"it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("zarr_format") != 3:
        raise StoreCorruptError(place, "it does not describe a group or array of Zarr 3")
    if kind is not None and document.get("node_type") != kind:
        raise StoreCorruptError(place, f"it describes {document.get('node_type')!r}, not {kind!r}")
    if not isinstance(document.setdefault("attributes", {}), dict):
        raise StoreCorruptError(place, "its attributes are not named")
    return document


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the sha256 of metadata as sorted JSON, without what consolidation adds."""
    kept = {name: value for name, value in document.items() if name != "consolidated_metadata"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class Manifest:
    """What the manifest of a store, or of one of its columns, says."""

    def __init__(self, store: Place, path: str, versions: Sequence[Contents]) -> None:
        self._store = store
        self._path = path
        self._versions = versions

    @classmethod
    def open(cls, store: Place, path: str = "") -> "Manifest | None":
        """Open the manifest of a store, or of a column; None where there is none (version 1).

        Raises:
            StoreCorruptError: It is damaged.
        """
        place = _below(store, path, FILE)
        if not is_file(place):
            return None
        document = read_metadata(place, "group")
        attributes = document["attributes"]
        if attributes.pop("sha256", None) != digest_of(document):
            raise StoreCorruptError(place, "its sha256 does not match its content")
        after = attributes.pop("next", None)
        return cls(store, path, [attributes, *([after] if after else [])])

    @property
    def is_growing(self) -> bool:
        """Whether a writer has begun to extend the store, and has not ended."""
        return len(self._versions) > 1

    @property
    def contents(self) -> Contents:
        """What it says of the store as it is, without what it is to become."""
        return self._versions[0]

    @property
    def after(self) -> Contents:
        """What it says of the store as it is to become; the same if it does not grow."""
        return self._versions[-1]

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """Names of the row arrays, in order."""
        return tuple(self.contents["arrays"])

    def check(self, path: str, document: Mapping[str, Any]) -> None:
        """Refuse metadata that are not those that were written.

        Args:
            path: Of the group or array in the store; "" is the store.
            document: Its `zarr.json`.

        Raises:
            StoreCorruptError: They differ.
        """
        name = f"{path}/{METADATA}" if path else METADATA
        if digest_of(document) not in [each["metadata"].get(name) for each in self._versions]:
            said_by = _below(self._store, self._path, FILE)
            raise StoreCorruptError(
                self._store / name,
                f"it is another one than {said_by} speaks of, or that is damaged",
            )

    def files(self, array: str, chunk: int) -> list[File]:
        """Return what a file of a row array may be: one, or two while the store grows."""
        found = []
        for each in self._versions:
            said = each["arrays"].get(array)
            if said and chunk < len(said["bytes"]):
                found.append(File(said["bytes"][chunk], said["crc32"][chunk]))
        return found

    def encoders(self, path: str) -> list[str]:
        """Return the digests that the metadata of an encoder may have."""
        return [each["metadata"].get(f"{path}/{METADATA}", "") for each in self._versions]


def describe(
    folder: Path, metadata: Iterable[str], arrays: Mapping[str, int], *, part: str = ""
) -> Contents:
    """Return what a manifest says of files on local disk.

    Args:
        folder: The store, or a part of it that is not yet in its place.
        metadata: Paths in the store of the groups and arrays; "" is the store.
        arrays: How many files each row array has.
        part: Path in the store of the folder.
    """
    digests = {}
    for path in sorted(metadata):
        document = read_metadata(folder / path.removeprefix(part).lstrip("/") / METADATA)
        digests[f"{path}/{METADATA}" if path else METADATA] = digest_of(document)
    said = {}
    for name, count in arrays.items():
        files = list(_files(folder / name, count))
        said[name] = {"bytes": [it.bytes for it in files], "crc32": [it.crc32 for it in files]}
    return {"metadata": digests, "arrays": said}


def _files(array: Path, count: int) -> Iterator[File]:
    for chunk in range(count):
        try:
            content = (array / "c" / str(chunk)).read_bytes()
        except FileNotFoundError:  # version 1 leaves out chunks of empty captions and labels
            yield File(0, 0)
        else:
            yield File(len(content), zlib.crc32(content))


def write_manifest(
    store: Place, contents: Contents, path: str = "", *, after: Contents | None = None
) -> None:
    """Write the manifest of a store, or of a column: it is replaced as a whole.

    Args:
        store: Whose.
        contents: What it says.
        path: Of the column.
        after: What the store will be.
    """
    attributes = contents | ({"next": after} if after and after != contents else {})
    document: dict[str, Any] = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    document["attributes"] = {**attributes, "sha256": digest_of(document)}
    content = json.dumps(document, sort_keys=True).encode()
    place = _below(store, path, FILE)
    if isinstance(place, Path) and isinstance(store, Path):
        make_folder(place.parent)
        with appearing(
            place, beside=store / "manifest"
        ) as partial:  # leftovers are looked for there
            partial.write_bytes(content)
    else:
        write(place, content)


def _below(store: Place, *parts: str) -> Place:
    for part in parts:
        store = store / part if part else store
    return store
