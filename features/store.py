"""The feature store: one Zarr v3 group, one row per image–text pair.

The layout is documented in docs/store.md. Two ideas carry it:

* Features are uncompressed little-endian blocks with a crc32c behind them, one chunk per file, so
  that a reader can `readinto` a chunk at the speed of the disk, and any Zarr reader can open it.
* The status chunk of some rows is written after their features chunk. A chunk without status is
  not done. Each file appears by an atomic rename, so a killed run leaves whole chunks only.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int32, Int64

from features.column import Column, create_column
from features.errors import (
    StoreError,
    StoreMismatchError,
    StoreNotFoundError,
)
from features.index import Index
from features.publish import new_group
from features.storage.files import children, files_below, is_file, read, zarr_store
from features.storage.place import Place, RemotePath, posix

FORMAT = "sail-features"
FORMAT_VERSION = 1
KEYS_AT_ONCE = 65_536
NUMBERS = ("label", "group")
STRINGS = np.dtypes.StringDType()
NOT_COMPARED = frozenset({"versions", "licence"})  # recorded, but no reason to compute again
# What holds of a column that was made before these fields were recorded.
UNRECORDED: dict[str, Any] = {"mode": "exact", "upright": False, "layer": -1}


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
    def create(cls, path: Place, index: Index, *, rows_per_chunk: int) -> "FeatureStore":
        """Write the rows of an index as a new store without columns: all of it, or nothing.

        Several may do so at once: one store comes of it, and all open that.

        Raises:
            StoreMismatchError: There is a store already, of other rows.
        """
        with new_group(path, store=path) as folder:
            digest = _write_new(folder, index, rows_per_chunk)
        store = cls.open(path)
        if store.keys_sha256 != digest:
            raise StoreMismatchError(
                str(path), "keys_sha256", found=store.keys_sha256, expected=digest
            )
        return store

    def copy_rows(self, path: Place) -> "FeatureStore":
        """Write a store of the same keys, captions, labels and groups, without columns.

        It appears at `path` as a whole; where there is one of these keys already, it stays.

        Raises:
            StoreMismatchError: There is a store at `path`, of other rows.
        """
        if not self.is_at(path):
            with new_group(path, store=path) as folder:
                _copy_rows(self.path, folder)
        copy = FeatureStore.open(path)
        if copy.keys_sha256 != self.keys_sha256:
            raise StoreMismatchError(
                str(path), "keys_sha256", found=copy.keys_sha256, expected=self.keys_sha256
            )
        return copy

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
        encoder = "/".join(name.split("/")[:2])
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
        if isinstance(self.path, RemotePath) and not self.path.can_be_listed:
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
        found, expected = UNRECORDED | group.attrs.asdict(), UNRECORDED | expected
        for field in sorted((found.keys() | expected.keys()) - NOT_COMPARED):
            if found.get(field) != expected.get(field):
                raise StoreMismatchError(
                    str(self.path / name),
                    field,
                    found=found.get(field),
                    expected=expected.get(field),
                )


def _write_new(folder: Path, index: Index, rows_per_chunk: int) -> str:
    """Make the group of a store without columns, and return the digest of its keys."""
    group = zarr.create_group(folder)
    names = row_array_names(index)
    for name in names:
        create_row_array(group, name, index, rows_per_chunk)
    write_rows(group, names, index, rows_per_chunk)
    group.create_group("image")
    group.create_group("text")
    digest = keys_digest(index)
    group.attrs.update(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rows": index.rows,
            "rows_per_chunk": rows_per_chunk,
            "keys_sha256": digest,
            "source": index.source,
        }
    )
    return digest


def _copy_rows(store: Place, folder: Path) -> None:
    """Copy the files of a store that belong to no encoder."""
    groups = [store / name / "zarr.json" for name in ("image", "text")]
    copied = [place for place in groups if is_file(place)]
    for name in ("key", "label", "group", "caption"):
        copied += [place for place, _ in files_below(store / name)]
    for place in copied:
        target = folder / posix(place).relative_to(posix(store))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read(place))
    metadata = json.loads(read(store / "zarr.json"))
    metadata.pop("consolidated_metadata", None)  # it would speak of the columns
    (folder / "zarr.json").write_text(json.dumps(metadata))


def keys_digest(index: Index, rows: int | None = None) -> str:
    """Return the sha256 over the keys, each ended by a newline: equal keys in equal order.

    Args:
        index: Whose keys.
        rows: How many of the first; all if not given.
    """
    digest = hashlib.sha256()
    left = index.rows if rows is None else rows
    for table in index.batches(KEYS_AT_ONCE, ("key",)):
        keys = table.column("key").slice(0, left).to_pylist()
        digest.update("".join(f"{key}\n" for key in keys).encode())
        left -= len(keys)
    return digest.hexdigest()


def row_array_names(index: Index) -> list[str]:
    """Return the names of the arrays that hold what an index says of its rows."""
    there = {"label": index.has_labels, "group": index.has_groups}
    captions = [f"caption/{field}" for field in index.fields]
    return ["key", *captions, *(name for name in there if there[name])]


def create_row_array(group: zarr.Group, name: str, index: Index, rows_per_chunk: int) -> None:
    """Make the empty array of that name, with a value for each row of an index."""
    is_number = name in NUMBERS
    array = group.create_array(
        name,
        shape=(index.rows,),
        chunks=(rows_per_chunk,),
        dtype="int32" if is_number else "string",
        fill_value=-1 if is_number else "",
        dimension_names=["row"],
    )
    if name == "label" and index.class_names:
        array.attrs["class_names"] = list(index.class_names)


def write_rows(
    group: zarr.Group, names: Sequence[str], index: Index, rows_per_chunk: int, first_chunk: int = 0
) -> None:
    """Write the chunks of some row arrays, from one on."""
    first = first_chunk * rows_per_chunk
    for table in index.batches(rows_per_chunk, tuple(names), first=first):
        stop = first + table.num_rows
        for name in names:
            column = table.column(name)
            values = column.to_numpy() if name in NUMBERS else column.to_pylist()
            _array(group, name)[first:stop] = np.array(
                values, dtype=np.int32 if name in NUMBERS else STRINGS
            )
        first = stop


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{name!r} of {group.store_path} is a group, not an array. Extract again.")
    return array
