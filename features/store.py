"""The feature store: one Zarr v3 group, one row per image–text pair.

The layout is documented in docs/store.md. Two ideas carry it:

* Features are uncompressed little-endian blocks with a crc32c behind them, one chunk per file, so
  that a reader can `readinto` a chunk at the speed of the disk, and any Zarr reader can open it.
* The status chunk of some rows is written after their features chunk. A chunk without status is
  not done. Each file appears by an atomic rename, so a killed run leaves whole chunks only.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import zarr
from jaxtyping import Bool, Int32, Int64, UInt64

from features.errors import (
    SourceError,
    StoreCorruptError,
    StoreError,
    StoreMismatchError,
    StoreNotFoundError,
)
from features.storage.column import MOST, Column, create_column, describe_column, encoder_of
from features.storage.files import (
    children,
    delete,
    folder_beside,
    is_file,
    move,
    remove_leftovers,
)
from features.storage.fingerprint import Fingerprint
from features.storage.groups import new_group
from features.storage.identity import Keys
from features.storage.joined_column import BESIDE, JoinedColumn
from features.storage.manifest import (
    FILE,
    METADATA,
    Contents,
    Manifest,
    describe,
    read_metadata,
    write_manifest,
)
from features.storage.parallel import in_order
from features.storage.place import Place, can_be_listed
from features.storage.rows import (
    KEY_HASH,
    NUMBERS,
    RowArray,
    RowSource,
    create_row_array,
    key_hashes,
    keys_digest,
    metadata_of_rows,
    write_rows,
    write_store_manifest,
)

FORMAT = "sail-features"
FORMAT_VERSION = 2
READABLE = (1, FORMAT_VERSION)
RESERVED = ("manifest",)
"""Names in a group that are no encoder and no caption field."""
MOST_ROWS_PER_CHUNK = 2**24


@runtime_checkable
class GrownRows(RowSource, Protocol):
    """The same, of rows that a store is extended by."""

    path: Path
    grown_from: tuple[int, ...]
    """Rows there were before each time that rows were appended."""


class FeatureStore:
    """A store on disk or under a URL: keys, captions, labels, and the columns of features."""

    def __init__(self, path: Place, document: Mapping[str, Any], manifest: Manifest | None) -> None:
        """Take what `open` found.

        Args:
            path: Where it is.
            document: Its `zarr.json`.
            manifest: What it says of its files; None in version 1.
        """
        self.path = path
        self.manifest = manifest
        self.document = document
        self.attributes: dict[str, Any] = dict(document["attributes"])
        self.rows = int(self.attributes["rows"])
        self.rows_per_chunk = int(self.attributes["rows_per_chunk"])
        self.keys_sha256 = str(self.attributes["keys_sha256"])
        self.source: dict[str, Any] = self.attributes["source"]
        self._opened: dict[str, RowArray] = {}
        self._sound: dict[str, set[int]] = {}

    @staticmethod
    def is_at(path: Place) -> bool:
        """Return whether there is something at the place of a store."""
        return path.exists() if isinstance(path, Path) else is_file(path / "zarr.json")

    @classmethod
    def open(cls, path: Place) -> "FeatureStore":
        """Open a store for reading and for writing of its pending chunks.

        Raises:
            StoreNotFoundError: There is nothing at `path`.
            StoreError: What is there is not a feature store of a format that is read.
            StoreCorruptError: Its metadata or its manifest are damaged.
        """
        if not is_file(path / METADATA) and not is_file(path / FILE):
            raise StoreNotFoundError(path)
        document = read_metadata(path / METADATA, "group")
        attributes = document["attributes"]
        found = (attributes.get("format"), attributes.get("format_version"))
        if found not in [(FORMAT, version) for version in READABLE]:
            if is_file(path / FILE):
                raise StoreCorruptError(
                    path / METADATA, f"it is not that of a store, but {path / FILE} is there"
                )
            raise StoreError(
                f"{path} has format {found[0]!r}, version {found[1]!r}. This program reads "
                f"{FORMAT!r}, versions 1 and {FORMAT_VERSION}. Check the path, or extract again."
            )
        manifest = None
        if found[1] != 1:
            manifest = Manifest.open(path)
            if manifest is None:
                raise StoreCorruptError(path / FILE, "the file is missing")
            manifest.check("", document)
        _check_attributes(path, attributes)
        return cls(path, document, manifest)

    @classmethod
    def create(cls, path: Place, rows: RowSource, *, rows_per_chunk: int) -> "FeatureStore":
        """Write rows as a new store without columns: all of it, or nothing.

        Several may do so at once: one store comes of it, and all open that.

        Raises:
            StoreMismatchError: There is a store already, of other rows.
        """
        digest = keys_digest(rows)
        if not is_file(path / METADATA):
            with new_group(path, store=path) as folder:
                names = rows.row_arrays
                facts = {
                    "rows": rows.rows,
                    "rows_per_chunk": rows_per_chunk,
                    "keys_sha256": digest,
                    "source": rows.source,
                }
                group = create_group(folder, names, facts, rows.class_names)
                write_rows(group, names, rows, rows_per_chunk)
                write_store_manifest(folder, [*names, KEY_HASH], -(-rows.rows // rows_per_chunk))
        store = cls.open(path)
        if store.keys_sha256 != digest:
            raise StoreMismatchError(
                str(path), "keys_sha256", found=store.keys_sha256, expected=digest
            )
        return store

    @property
    def num_chunks(self) -> int:
        """Chunks of every row array."""
        return -(-self.rows // self.rows_per_chunk)

    @property
    def full_chunks(self) -> int:
        """Chunks that hold as many rows as a chunk can."""
        return self.rows // self.rows_per_chunk

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Caption fields, in the order of their names (numbers by value)."""
        if self.manifest is not None:
            arrays = self.manifest.arrays
            fields = [name[8:] for name in arrays if name.startswith("caption/")]
        else:
            fields = self._members("caption")
        return tuple(sorted(fields, key=lambda name: (not name.isdigit(), len(name), name)))

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, where the source gave them."""
        if "label" not in self.row_arrays:
            return None
        names = self._row_array("label").attributes.get("class_names")
        return tuple(str(name) for name in names) if isinstance(names, list) else None

    @cached_property
    def row_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that belong to no encoder."""
        there = [f"caption/{field}" for field in self.fields]
        if self.manifest is not None:
            numbers = [name for name in NUMBERS if name in self.manifest.arrays]
        else:
            numbers = [name for name in NUMBERS if is_file(self.path / name / METADATA)]
        return ("key", *there, *numbers)

    @property
    def stored_arrays(self) -> tuple[str, ...]:
        """The same with what is made of them: `key_hash`, which stores of version 1 have not."""
        has_hashes = self.manifest is not None and KEY_HASH in self.manifest.arrays
        return (*self.row_arrays, *([KEY_HASH] if has_hashes else []))

    def blocks(
        self, names: Sequence[str], rows: int, *, first: int = 0
    ) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of such arrays by name, from row `first` on, so many rows at once."""
        for start in range(first, self.rows, rows):
            yield {name: self.values(name, start, start + rows).tolist() for name in names}

    def keys(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the keys of rows `start` to `stop` as a numpy string array."""
        return self.values("key", start, stop)

    def captions(self, field: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return one caption per row, empty where there is none, as a numpy string array."""
        if field not in self.fields:
            raise StoreError(
                f"{self.path} has no caption field {field!r}; it has {list(self.fields)}. "
                f"Name one of these."
            )
        return self.values(f"caption/{field}", start, stop)

    def values(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the values of a row array: strings, or int32.

        Raises:
            StoreCorruptError: A file is damaged, or not the one that was written.
        """
        return self._row_array(name).read(start, self.rows if stop is None else stop)

    def strings_at(self, name: str, rows: Int64[np.ndarray, "rows"]) -> np.ndarray:
        """Return `key` or `caption/<field>` of rows in any order, reading each chunk once."""
        return self._row_array(name).at(rows)

    def labels(self) -> Int32[np.ndarray, "rows"] | None:
        """Return the class of every row, -1 where unknown."""
        return self._numbers("label")

    def groups(self) -> Int32[np.ndarray, "rows"] | None:
        """Return the compositional example each row belongs to, -1 for none."""
        return self._numbers("group")

    def columns(self) -> list[str]:
        """Names of the feature columns: `image/<encoder>` and `text/<encoder>/<field>`.

        Raises:
            StoreCorruptError: The folder of one is there, and does not say what it is.
        """
        texts = [f"text/{name}" for name in self._members("text")]
        return [
            *(f"image/{name}" for name in self._members("image")),
            *(f"{encoder}/{field}" for encoder in texts for field in self._members(encoder)),
        ]

    def column(self, name: str) -> Column:
        """Open one column, or several side by side as one: `image/cls+mean`.

        Raises:
            StoreError: There is none of that name.
        """
        if BESIDE in name:
            kind, encoders, *field = name.split("/")
            parts = ["/".join([kind, each, *field]) for each in encoders.split(BESIDE)]
            return JoinedColumn(self.path, [self.column(part) for part in parts])
        encoder = encoder_of(name)
        if not all(
            is_file(self.path / part / "zarr.json") for part in (encoder, f"{name}/features")
        ):
            columns = self.columns()
            raise StoreError(
                f"{self.path} has no column {name!r}; it has {columns or 'none'}. "
                f"Name one of these, or add the encoder to the recipe and run `sail extract`."
            )
        # A store that was killed while it grew still has its old rows, and longer columns.
        sound = self._sound.setdefault(name, set())
        return Column(self.path, name, rows=self.rows, keys=self._key_files(), sound=sound)

    def _key_files(self) -> Keys | None:
        manifest = self.manifest
        if manifest is None:
            return None
        return lambda chunk: [file.crc32 for file in manifest.files("key", chunk)]

    def add_encoder(
        self, name: str, fingerprint: dict[str, Any], *, dim: int, dtype: str = "float16"
    ) -> None:
        """Make the empty columns of an encoder, or check that those there are of the same one.

        A text encoder has a column per caption field; fields that came later get theirs now.
        Several may do so at once: one makes them, the others check.

        Args:
            name: `image/<encoder>` or `text/<encoder>`.
            fingerprint: What decides the features; see `features.encoders`.
            dim: Length of a feature vector.
            dtype: `float16`, or `int8` for features in half the space; see docs/store.md.

        Raises:
            StoreMismatchError: The column was made by something else; the field is named.
        """
        target = self.path / name
        fields = self.fields if name.startswith("text/") else ()
        if is_file(target / "zarr.json"):
            self._check_fingerprint(name, fingerprint)
            about = read_metadata(target / METADATA, "group")
            for field in sorted(set(fields).difference(self._members(name))):
                with new_group(target / field, store=self.path) as folder:
                    arrays = self._create_column(zarr.create_group(folder), dim, dtype)
                    self._seal(folder, f"{name}/{field}", arrays, f"{name}/{field}", about)
            return
        with new_group(target, store=self.path) as folder:
            group = zarr.create_group(folder, attributes=fingerprint)
            columns = {name: group}
            if name.startswith("text/"):
                columns = {f"{name}/{field}": group.create_group(field) for field in fields}
            for column, its_group in columns.items():
                arrays = self._create_column(its_group, dim, dtype)
                self._seal(folder, column, arrays, name)
        self._check_fingerprint(name, fingerprint)

    def _create_column(self, group: zarr.Group, dim: int, dtype: str) -> tuple[str, ...]:
        identified = self.manifest is not None
        return create_column(
            group, self.rows, dim, self.rows_per_chunk, dtype=dtype, identified=identified
        )

    def _seal(
        self,
        folder: Path,
        name: str,
        arrays: Sequence[str],
        part: str,
        encoder: Mapping[str, Any] | None = None,
    ) -> None:
        if self.manifest is not None:
            contents = describe_column(folder, name, arrays, part=part, encoder=encoder)
            write_manifest(folder, contents, name.removeprefix(part).lstrip("/"))

    def _numbers(self, name: str) -> Int32[np.ndarray, "rows"] | None:
        return self.values(name) if name in self.row_arrays else None

    def _row_array(self, name: str) -> RowArray:
        if name not in self._opened:
            self._opened[name] = RowArray(
                self.path, name, self.rows, self.rows_per_chunk, self.manifest
            )
        return self._opened[name]

    def _members(self, group: str) -> list[str]:
        """Return the sorted names of the arrays and groups in a group."""
        if not can_be_listed(self.path):
            return self._consolidated_members(group)
        folder = self.path / group
        found = [name for name, size in children(folder) if size is None and name[0] != "."]
        found = [name for name in found if name not in RESERVED]
        whole = [name for name in found if is_file(folder / name / METADATA)]
        if len(whole) < len(found) and isinstance(folder, Path):  # a URL may hold half an upload
            name = next(name for name in found if name not in whole)
            raise StoreCorruptError(folder / name / METADATA, "the file is missing")
        return whole

    def _consolidated_members(self, group: str) -> list[str]:
        """Return them from the metadata of the whole store, which the root can hold."""
        consolidated = self.document.get("consolidated_metadata")
        if not isinstance(consolidated, dict):
            raise StoreError(
                f"{self.path} is on a web server, which does not list files. Consolidated metadata "
                f"was expected in it. Call `zarr.consolidate_metadata` on the store before it is "
                f"put there, or use s3://, gs:// or hf://."
            )
        paths = [str(path).split("/") for path in consolidated.get("metadata", ())]
        parent = group.split("/")
        found = (path[-1] for path in paths if path[:-1] == parent)
        return sorted(name for name in found if name not in RESERVED)

    def _check_fingerprint(self, name: str, expected: dict[str, Any]) -> None:
        about = read_metadata(self.path / name / METADATA, "group")
        for field, found, wanted in Fingerprint(about["attributes"]).differences(expected):
            raise StoreMismatchError(str(self.path / name), field, found=found, expected=wanted)


def create_group(
    folder: Path,
    names: Iterable[str],
    facts: dict[str, Any],
    class_names: Sequence[str] | None,
) -> zarr.Group:
    """Make the group of a store without columns, with empty row arrays.

    Args:
        folder: Where.
        names: Of the row arrays; `key_hash` comes with them.
        facts: The attributes `rows`, `rows_per_chunk`, `keys_sha256` and `source`.
        class_names: Of the labels.
    """
    attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts}
    group = zarr.create_group(folder, attributes=attributes)
    for name in (*names, KEY_HASH):
        create_row_array(group, name, facts["rows"], facts["rows_per_chunk"], class_names)
    group.create_group("image")
    group.create_group("text")
    return group


def _check_attributes(path: Place, attributes: Mapping[str, Any]) -> None:
    limits = {"rows": (0, MOST), "rows_per_chunk": (1, MOST_ROWS_PER_CHUNK)}
    for name, (least, most) in limits.items():
        value = attributes.get(name)
        if type(value) is not int or not least <= value <= most:
            raise StoreCorruptError(
                path / METADATA, f"{name} is {value!r}, not a number from {least} to {most}"
            )
    for name, kind in {"keys_sha256": str, "source": dict}.items():
        if not isinstance(attributes.get(name), kind):
            raise StoreCorruptError(path / METADATA, f"{name} is {attributes.get(name)!r}")


CHUNKS_AT_ONCE = 16  # under a URL they are fetched side by side


def store_key_hashes(store: FeatureStore) -> UInt64[np.ndarray, "rows"]:
    """Return `key_hashes` of all rows of a store: as it keeps them, or computed from its keys."""
    if KEY_HASH in store.stored_arrays:
        return store.values(KEY_HASH)
    size = CHUNKS_AT_ONCE * store.rows_per_chunk
    hashes = np.empty(store.rows, dtype=np.uint64)
    for start in range(0, store.rows, size):
        keys = store.keys(start, start + size).tolist()
        hashes[start : start + len(keys)] = key_hashes(keys, len(keys))
    return hashes


def rows_by_key(
    hashes: UInt64[np.ndarray, "rows"], wanted: UInt64[np.ndarray, "others"]
) -> tuple[Int64[np.ndarray, "others"], Bool[np.ndarray, "others"]]:
    """Find rows by their keys.

    Args:
        hashes: Of the keys of all rows.
        wanted: Of keys.

    Returns:
        The row of each wanted key, and whether there is one; if not, the row is any.
    """
    if not len(hashes):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    order = np.argsort(hashes, kind="stable")
    places = np.searchsorted(hashes, wanted, sorter=order)
    rows = order[np.minimum(places, len(order) - 1)]
    return rows, hashes[rows] == wanted


logger = logging.getLogger(__name__)


def extend_store(
    store: FeatureStore, index: GrownRows, *, append: bool, is_checked: bool = False
) -> FeatureStore:
    """Return the store with all rows and caption fields of an index, whose first rows it has.

    Args:
        store: Its features stay as they are; further rows and fields are pending.
        index: The index of the same split.
        append: Whether rows may be added that were not appended to the index.
        is_checked: Whether `check_first_rows` was called before.

    Raises:
        SourceError: As `check_first_rows`.
    """
    if not is_checked:
        check_first_rows(store, index, append=append)
    remove_leftovers(store.path)
    added = [name for name in index.row_arrays if name not in store.row_arrays]
    if not added and index.rows == store.rows and index.source == store.source:
        return _finished(store)
    with folder_beside(store.path) as folder:
        manifests = _write(folder, store, index, added)
        for path, (now, after) in manifests.items():
            write_manifest(store.path, now, path, after=after)
        _move(folder, store, grows=index.rows > store.rows)
        for path in sorted(manifests, reverse=True):  # that of the store, "", is the last
            write_manifest(store.path, manifests[path][1], path)
    logger.info("%s: %d rows, %d of them new", store.path, index.rows, index.rows - store.rows)
    return FeatureStore.open(store.path)


def _finished(store: FeatureStore) -> FeatureStore:
    """End what a writer began that was killed after all rows were there."""
    if store.manifest is None or not store.manifest.is_growing:
        return store
    for path in [*store.columns(), ""]:
        if (manifest := Manifest.open(store.path, path)) is not None:
            write_manifest(store.path, manifest.after, path)
    return FeatureStore.open(store.path)


def check_first_rows(store: FeatureStore, index: GrownRows, *, append: bool) -> None:
    """Check that `extend_store` may extend a store by the rows of an index.

    Raises:
        SourceError: The store does not have the first rows of the index, or rows are to be added
            without having been asked for.
    """
    has_them = store.rows <= index.rows
    if not has_them or store.keys_sha256 != keys_digest(index, store.rows):
        raise SourceError(
            f"The store {store.path} has {store.rows} rows with keys {store.keys_sha256[:12]}…, "
            f"the index {index.path} has {index.rows} others. The same rows were expected. Give "
            f"this run another `run.dir`, or delete {store.path} to extract again."
        )
    if store.rows < index.rows and not (append or store.rows in index.grown_from):
        raise SourceError(
            f"The store {store.path} has {store.rows} rows, the index {index.path} has "
            f"{index.rows - store.rows} more. The same rows were expected. If they are wanted, run "
            f"`sail extract` with --append; if not, narrow `path` or `rows` of the source, and "
            f"delete the index."
        )


def _write(
    folder: Path, store: FeatureStore, index: RowSource, added: list[str]
) -> dict[str, tuple[Contents, Contents]]:
    """Write beside the store what it will have, except chunks that it has already.

    Returns:
        The manifests as they are and as they will be: of the store, and of each column that grows.
    """
    attributes = store.attributes | {
        "rows": index.rows,
        "keys_sha256": keys_digest(index),
        "source": index.source,
    }
    group = zarr.create_group(folder, attributes=attributes)
    manifest, size = store.manifest, store.rows_per_chunk
    grows = index.rows > store.rows
    there = [name for name in index.row_arrays if name not in added]
    longer = [*there, *(name for name in store.stored_arrays if name == KEY_HASH)]
    new = [*added, *(longer if grows else [])]
    for name in new:
        create_row_array(
            group, name, index.rows, size, index.class_names, checked=manifest is not None
        )
    if added:
        write_rows(group, added, index, size)
    if grows:
        write_rows(group, there, index, size, store.full_chunks)
    manifests = {}
    if manifest is not None:
        now = manifest.contents
        after = _grown(folder, now, new, -(-index.rows // size), first=store.full_chunks)
        manifests[""] = (now, after)
    for name in store.columns() if grows else ():
        column, its_group = store.column(name), group.create_group(name)
        dtype, identified = column.dtype.name, manifest is not None
        arrays = create_column(
            its_group, index.rows, column.dim, size, dtype=dtype, identified=identified
        )
        its_own = Manifest.open(store.path, name)
        if manifest is not None and its_own is not None:
            longer_ones = describe(folder, [f"{name}/{array}" for array in arrays], {})
            now = its_own.contents
            metadata = now["metadata"] | longer_ones["metadata"]
            manifests[name] = (now, now | {"metadata": metadata})
    return manifests


def _grown(
    folder: Path, now: Contents, names: Sequence[str], num_chunks: int, *, first: int
) -> Contents:
    """Return what the manifest of a store will say.

    Args:
        folder: Has the files of some row arrays from a chunk on, and all files of new ones.
        now: What it says.
        names: Of these arrays.
        num_chunks: Of each of them.
        first: The chunk.
    """
    paths = {
        "",
        *names,
        *(path for path in metadata_of_rows(names) if is_file(folder / path / METADATA)),
    }
    new = describe(folder, paths, dict.fromkeys(names, num_chunks))
    arrays = dict(now["arrays"])
    for name, files in new["arrays"].items():
        before = now["arrays"].get(name, files)
        arrays[name] = {key: before[key][:first] + files[key][first:] for key in files}
    return {"metadata": {**now["metadata"], **new["metadata"]}, "arrays": arrays}


def _move(folder: Path, store: FeatureStore, *, grows: bool) -> None:
    """Move the files written beside a store into it, in the order that is safe."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    chunks = [name for name in names if name.name != METADATA]
    metadata = [name for name in names if name.name == METADATA and name.parent.name]

    def place(name: PurePath) -> None:
        move(folder / name, store.path / name.as_posix())

    for _ in in_order(place, chunks, at=store.path):
        pass
    for name in metadata:
        if not (_is_group(folder / name) and is_file(store.path / name.as_posix())):
            place(name)  # a group that is there stays: that of an encoder has its fingerprint
    if grows and store.full_chunks < store.num_chunks:
        for column in map(store.column, store.columns()):
            delete(column.status_file(store.full_chunks))
    place(PurePath(METADATA))


def _is_group(file: Path) -> bool:
    return bool(read_metadata(file)["node_type"] == "group")
