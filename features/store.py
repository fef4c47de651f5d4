"""The feature store: one Zarr v3 group, one row per image–text pair.

The layout is documented in docs/store.md. Two ideas carry it:

* Features are uncompressed little-endian blocks with a crc32c behind them, one chunk per file, so
  that a reader can `readinto` a chunk at the speed of the disk, and any Zarr reader can open it.
* The status chunk of some rows is written after their features chunk. A chunk without status is
  not done. Each file appears by an atomic rename, so a killed run leaves whole chunks only.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import zarr
from jaxtyping import Bool, Int32, Int64, UInt64

from features.errors import SourceError, StoreError, StoreMismatchError, StoreNotFoundError
from features.storage.column import Column, create_column, encoder_of
from features.storage.files import (
    children,
    delete,
    folder_beside,
    is_file,
    move,
    remove_leftovers,
    zarr_store,
)
from features.storage.fingerprint import Fingerprint
from features.storage.groups import new_group
from features.storage.parallel import in_order
from features.storage.place import Place, can_be_listed

FORMAT = "sail-features"
FORMAT_VERSION = 1
KEYS_AT_ONCE = 65_536
NUMBERS = ("label", "group")
"""Row arrays of int32, -1 where unknown; all others are of strings."""
STRINGS = np.dtypes.StringDType()


@runtime_checkable
class RowSource(Protocol):
    """What is known of the rows of a store that is made: an `Index`, or another store."""

    rows: int
    source: dict[str, Any]
    """Where they come from, as the store records it."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, where they are known."""

    @property
    def row_arrays(self) -> tuple[str, ...]:
        """Names of the arrays: `key`, `caption/<field>`, `label`, `group`."""

    def blocks(
        self, names: Sequence[str], rows: int, *, first: int = 0
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """Yield the values of some arrays by name, from row `first` on, so many rows at once."""


@runtime_checkable
class GrownRows(RowSource, Protocol):
    """The same, of rows that a store is extended by."""

    path: Path
    grown_from: tuple[int, ...]
    """Rows there were before each time that rows were appended."""


class FeatureStore:
    """A store on disk or under a URL: keys, captions, labels, and the columns of features."""

    def __init__(self, path: Place, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        self.attributes: dict[str, Any] = dict(group.attrs.asdict())
        self.rows = int(self.attributes["rows"])
        self.rows_per_chunk = int(self.attributes["rows_per_chunk"])
        self.keys_sha256 = str(self.attributes["keys_sha256"])
        self.source: dict[str, Any] = self.attributes["source"]
        self._opened: dict[str, zarr.Array[Any]] = {}

    @staticmethod
    def is_at(path: Place) -> bool:
        """Return whether there is something at the place of a store."""
        return path.exists() if isinstance(path, Path) else is_file(path / "zarr.json")

    @classmethod
    def open(cls, path: Place) -> "FeatureStore":
        """Open a store for reading and for writing of its pending chunks.

        Raises:
            StoreNotFoundError: There is nothing at `path`.
            StoreError: What is there is not a feature store of this format.
        """
        if not is_file(path / "zarr.json"):
            raise StoreNotFoundError(path)
        group = zarr.open_group(zarr_store(path), mode="r", zarr_format=3)
        found = (group.attrs.get("format"), group.attrs.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            raise StoreError(
                f"{path} has format {found[0]!r}, version {found[1]!r}. This program reads "
                f"{FORMAT!r}, version {FORMAT_VERSION}. Check the path, or extract again."
            )
        return cls(path, group)

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
        fields = self._members("caption")
        return tuple(sorted(fields, key=lambda name: (not name.isdigit(), len(name), name)))

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, where the source gave them."""
        names = self._group["label"].attrs.get("class_names") if "label" in self._group else None
        return tuple(str(name) for name in names) if isinstance(names, list) else None

    @property
    def row_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that belong to no encoder."""
        numbers = (name for name in NUMBERS if name in self._group)
        return ("key", *(f"caption/{field}" for field in self.fields), *numbers)

    def blocks(
        self, names: Sequence[str], rows: int, *, first: int = 0
    ) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of such arrays by name, from row `first` on, so many rows at once."""
        for start in range(first, self.rows, rows):
            part = self._slice(start, start + rows)
            yield {name: np.asarray(self._row_array(name)[part]).tolist() for name in names}

    def keys(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the keys of rows `start` to `stop` as a numpy string array."""
        return np.asarray(self._row_array("key")[self._slice(start, stop)])

    def captions(self, field: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return one caption per row, empty where there is none, as a numpy string array."""
        if field not in self.fields:
            raise StoreError(
                f"{self.path} has no caption field {field!r}; it has {list(self.fields)}. "
                f"Name one of these."
            )
        return np.asarray(self._row_array(f"caption/{field}")[self._slice(start, stop)])

    def strings_at(self, name: str, rows: Int64[np.ndarray, "rows"]) -> np.ndarray:
        """Return `key` or `caption/<field>` of rows in any order, reading each chunk once."""
        return np.asarray(self._row_array(name).oindex[rows])

    def labels(self) -> Int32[np.ndarray, "rows"] | None:
        """Return the class of every row, -1 where unknown."""
        return self._numbers("label")

    def groups(self) -> Int32[np.ndarray, "rows"] | None:
        """Return the compositional example each row belongs to, -1 for none."""
        return self._numbers("group")

    def columns(self) -> list[str]:
        """Names of the feature columns: `image/<encoder>` and `text/<encoder>/<field>`."""
        texts = [f"text/{name}" for name in self._members("text")]
        return [
            *(f"image/{name}" for name in self._members("image")),
            *(f"{encoder}/{field}" for encoder in texts for field in self._members(encoder)),
        ]

    def column(self, name: str) -> Column:
        """Open one column.

        Raises:
            StoreError: There is none of that name.
        """
        encoder = encoder_of(name)
        if not all(
            is_file(self.path / part / "zarr.json") for part in (encoder, f"{name}/features")
        ):
            columns = self.columns()
            raise StoreError(
                f"{self.path} has no column {name!r}; it has {columns or 'none'}. "
                f"Name one of these, or add the encoder to the recipe and run `sail extract`."
            )
        column = Column(self.path, name)
        column.rows = self.rows  # a store that was killed while it grew still has its old rows
        return column

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
            for field in sorted(set(fields).difference(self._members(name))):
                with new_group(target / field, store=self.path) as folder:
                    group = zarr.create_group(folder)
                    create_column(group, self.rows, dim, self.rows_per_chunk, dtype=dtype)
            return
        with new_group(target, store=self.path) as folder:
            group = zarr.create_group(folder, attributes=fingerprint)
            columns = [group]
            if name.startswith("text/"):
                columns = [group.create_group(field) for field in fields]
            for column in columns:
                create_column(column, self.rows, dim, self.rows_per_chunk, dtype=dtype)
        self._check_fingerprint(name, fingerprint)

    def _numbers(self, name: str) -> Int32[np.ndarray, "rows"] | None:
        if name not in self._group:
            return None
        return np.asarray(self._row_array(name)[: self.rows])

    def _row_array(self, name: str) -> zarr.Array[Any]:
        if name not in self._opened:
            self._opened[name] = _array(self._group, name)
        return self._opened[name]

    def _slice(self, start: int, stop: int | None) -> slice:
        return slice(start, self.rows if stop is None else min(stop, self.rows))

    def _members(self, group: str) -> list[str]:
        """Return the sorted names of the arrays and groups in a group."""
        if not can_be_listed(self.path):
            return self._consolidated_members(group)
        folder = self.path / group
        found = [name for name, size in children(folder) if size is None and name[0] != "."]
        return [name for name in found if is_file(folder / name / "zarr.json")]

    def _consolidated_members(self, group: str) -> list[str]:
        """Return them from the metadata of the whole store, which the root can hold."""
        metadata = self._group.metadata.consolidated_metadata
        if metadata is None:
            raise StoreError(
                f"{self.path} is on a web server, which does not list files. Consolidated metadata "
                f"was expected in it. Call `zarr.consolidate_metadata` on the store before it is "
                f"put there, or use s3://, gs:// or hf://."
            )
        paths = [path.split("/") for path in metadata.flattened_metadata]
        parent = group.split("/")
        return sorted(path[-1] for path in paths if path[:-1] == parent)

    def _check_fingerprint(self, name: str, expected: dict[str, Any]) -> None:
        group = zarr.open_group(zarr_store(self.path / name), mode="r", zarr_format=3)
        for field, found, wanted in Fingerprint(group.attrs.asdict()).differences(expected):
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
        names: Of the row arrays.
        facts: The attributes `rows`, `rows_per_chunk`, `keys_sha256` and `source`.
        class_names: Of the labels.
    """
    attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts}
    group = zarr.create_group(folder, attributes=attributes)
    for name in names:
        create_row_array(group, name, facts["rows"], facts["rows_per_chunk"], class_names)
    group.create_group("image")
    group.create_group("text")
    return group


def keys_digest(source: RowSource, rows: int | None = None) -> str:
    """Return the sha256 over the keys, each ended by a newline: equal keys in equal order.

    Args:
        source: Whose keys.
        rows: How many of the first; all if not given.
    """
    digest = hashlib.sha256()
    left = source.rows if rows is None else rows
    for block in source.blocks(("key",), KEYS_AT_ONCE):
        keys = block["key"][:left]
        digest.update("".join(f"{key}\n" for key in keys).encode())
        left -= len(keys)
    return digest.hexdigest()


def create_row_array(
    group: zarr.Group,
    name: str,
    rows: int,
    rows_per_chunk: int,
    class_names: Sequence[str] | None,
) -> None:
    """Make the empty array of that name, with a value for each row."""
    is_number = name in NUMBERS
    array = group.create_array(
        name,
        shape=(rows,),
        chunks=(rows_per_chunk,),
        dtype="int32" if is_number else "string",
        fill_value=-1 if is_number else "",
        dimension_names=["row"],
    )
    if name == "label" and class_names:
        array.attrs["class_names"] = list(class_names)


def write_rows(
    group: zarr.Group,
    names: Sequence[str],
    source: RowSource,
    rows_per_chunk: int,
    first_chunk: int = 0,
) -> None:
    """Write the chunks of some row arrays, from one on."""
    first = first_chunk * rows_per_chunk
    for block in source.blocks(names, rows_per_chunk, first=first):
        stop = first + len(block[names[0]])
        for name in names:
            dtype = np.int32 if name in NUMBERS else STRINGS
            _array(group, name)[first:stop] = np.array(block[name], dtype=dtype)
        first = stop


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{name!r} of {group.store_path} is a group, not an array. Extract again.")
    return array


HASH_BYTES = 8
CHUNKS_AT_ONCE = 16  # under a URL they are fetched side by side


def key_hashes(keys: Iterable[str], count: int) -> UInt64[np.ndarray, "rows"]:
    """Return the first 8 bytes of the blake2b of each string as an unsigned number."""
    blake2b = hashlib.blake2b
    joined = b"".join(blake2b(str(key).encode(), digest_size=HASH_BYTES).digest() for key in keys)
    hashes = np.frombuffer(joined, dtype="<u8")
    if len(hashes) != count:
        raise ValueError(f"Got {len(hashes)} keys where {count} were said to come.")
    return hashes


def store_key_hashes(store: FeatureStore) -> UInt64[np.ndarray, "rows"]:
    """Return `key_hashes` of all rows of a store."""
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
METADATA = "zarr.json"


def extend_store(store: FeatureStore, index: GrownRows, *, append: bool) -> FeatureStore:
    """Return the store with all rows and caption fields of an index, whose first rows it has.

    Args:
        store: Its features stay as they are; further rows and fields are pending.
        index: The index of the same split.
        append: Whether rows may be added that were not appended to the index.

    Raises:
        SourceError: The store does not have the first rows of the index, or rows are to be added
            without having been asked for.
    """
    _check_first_rows(store, index, append=append)
    remove_leftovers(store.path)
    added = [name for name in index.row_arrays if not is_file(store.path / name / METADATA)]
    if not added and index.rows == store.rows and index.source == store.source:
        return store
    with folder_beside(store.path) as folder:
        _write(folder, store, index, added)
        _move(folder, store, grows=index.rows > store.rows)
    logger.info("%s: %d rows, %d of them new", store.path, index.rows, index.rows - store.rows)
    return FeatureStore.open(store.path)


def _check_first_rows(store: FeatureStore, index: GrownRows, *, append: bool) -> None:
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


def _write(folder: Path, store: FeatureStore, index: RowSource, added: list[str]) -> None:
    """Write beside the store what it will have, except chunks that it has already."""
    attributes = store.attributes | {
        "rows": index.rows,
        "keys_sha256": keys_digest(index),
        "source": index.source,
    }
    group = zarr.create_group(folder, attributes=attributes)
    grows = index.rows > store.rows
    there = [name for name in index.row_arrays if name not in added]
    for name in [*added, *(there if grows else [])]:
        create_row_array(group, name, index.rows, store.rows_per_chunk, index.class_names)
    if added:
        write_rows(group, added, index, store.rows_per_chunk)
    if grows:
        write_rows(group, there, index, store.rows_per_chunk, store.full_chunks)
        for name in store.columns():
            column, longer = store.column(name), group.create_group(name)
            size = store.rows_per_chunk
            create_column(longer, index.rows, column.dim, size, dtype=column.dtype.name)


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
    return bool(json.loads(file.read_text(encoding="utf-8"))["node_type"] == "group")
