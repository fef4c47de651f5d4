"""The arrays with a value for each row (keys, captions, labels), read chunk by chunk and checked.

Zarr itself would read a missing chunk as empty values, and take the sizes that a chunk states for
true: a key chunk of 13 bytes can ask for 16 GB.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Int64, UInt64
from numcodecs import Zstd
from numcodecs.vlen import VLenUTF8
from zarr.codecs import Crc32cCodec, ZstdCodec

from features.errors import StoreCorruptError
from features.storage.chunks import CRC_BYTES, whole_file
from features.storage.manifest import METADATA, Manifest, describe, read_metadata, write_manifest
from features.storage.parallel import in_order
from features.storage.place import Place

NUMBERS = ("label", "group")
"""Row arrays of int32, -1 where unknown; those of a source are of strings otherwise."""
KEY_HASH = "key_hash"
"""Row array of uint64 that is made of the keys, for joins; `key_hashes`."""
DTYPES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(NUMBERS, np.dtype("<i4")),
    KEY_HASH: np.dtype("<u8"),
}
EMPTY: dict[str, int] = {**dict.fromkeys(NUMBERS, -1), KEY_HASH: 0}
HASH_BYTES = 8
STRINGS = np.dtypes.StringDType()
KEYS_AT_ONCE = 65_536
CHUNK_BYTES = 1 << 30
"""The most that the strings of a chunk may take."""


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


class RowArray:
    """A row array of a store."""

    def __init__(
        self, store: Place, name: str, rows: int, rows_per_chunk: int, manifest: Manifest | None
    ) -> None:
        """Open it.

        Args:
            store: Where the store is.
            name: `key`, `key_hash`, `caption/<field>`, `label` or `group`.
            rows: Of the store.
            rows_per_chunk: Of the store.
            manifest: Of the store; None in version 1.

        Raises:
            StoreCorruptError: Its metadata are damaged, or not those of such an array.
        """
        self._path = store / name
        self._name = name
        self._dtype = DTYPES.get(name)
        self._rows = rows
        self._size = rows_per_chunk
        self._manifest = manifest
        document = read_metadata(self._path / METADATA, "array")
        if manifest is not None:
            manifest.check(name, document)
        self.attributes: dict[str, Any] = document["attributes"]
        self._codecs = _codecs(self._path / METADATA, document, name, rows, rows_per_chunk)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the values of rows `start` to `stop`: int32, uint64, or strings.

        Raises:
            StoreCorruptError: A chunk is missing, damaged, or not the one that was written.
        """
        stop = min(stop, self._rows)
        if start >= stop:
            return self._empty(0)
        chunks = range(start // self._size, -(-stop // self._size))
        values = np.concatenate(list(in_order(self._chunk, chunks, at=self._path)))
        first = chunks.start * self._size
        return np.asarray(values[start - first : stop - first])

    def at(self, rows: Int64[np.ndarray, "rows"]) -> np.ndarray:
        """Return the values of rows in any order; each chunk is read once."""
        found = self._empty(len(rows))
        numbers = rows // self._size
        chunks = np.unique(numbers).tolist()
        read_chunks = in_order(self._chunk, chunks, at=self._path)
        for chunk, values in zip(chunks, read_chunks, strict=True):
            here = np.flatnonzero(numbers == chunk)
            found[here] = values[rows[here] - chunk * self._size]
        return found

    def _empty(self, rows: int) -> np.ndarray:
        if self._dtype is None:
            return np.zeros(rows, STRINGS)
        return np.full(rows, EMPTY[self._name], dtype=self._dtype)

    def _chunk(self, chunk: int) -> np.ndarray:
        place = self._path / "c" / str(chunk)
        content = whole_file(place, CHUNK_BYTES)
        if content is None:
            return self._missing(place, chunk)
        if self._manifest is not None:
            check_file(place, content, self._manifest.files(self._name, chunk))
        values = self._decoded(place, content)
        rows = min(self._size, self._rows - chunk * self._size)
        return values[:rows]  # the last is filled up

    def _missing(self, place: Place, chunk: int) -> np.ndarray:
        if self._manifest is None:  # version 1 leaves out chunks of empty captions and labels
            is_empty = self._name != "key"
        else:
            is_empty = (0, 0) in self._manifest.files(self._name, chunk)
        if not is_empty:
            raise StoreCorruptError(place, "the file is missing")
        return self._empty(min(self._size, self._rows - chunk * self._size))

    def _decoded(self, place: Place, content: bytes) -> np.ndarray:
        size, limit = self._size, CHUNK_BYTES
        if "crc32c" in self._codecs:
            content, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
            if google_crc32c.value(content).to_bytes(CRC_BYTES, "little") != crc:
                raise StoreCorruptError(place, "its crc32c does not match its bytes")
        if self._dtype is not None:
            limit = self._dtype.itemsize * size
        try:
            if "zstd" in self._codecs:
                check_frame(place, content, limit)
                content = Zstd().decode(content)
            if self._dtype is not None:
                return np.frombuffer(content, dtype=self._dtype, count=size)
            check_strings(place, content, size)
            return np.asarray(VLenUTF8().decode(content)).astype(STRINGS)
        except (ValueError, RuntimeError, TypeError, struct.error) as error:
            raise StoreCorruptError(place, f"it cannot be decoded ({error})") from error


def check_file(place: Place, content: bytes, expected: Sequence[tuple[int, int]]) -> None:
    """Refuse a file that is not the one that a manifest speaks of.

    Raises:
        StoreCorruptError: It is longer, shorter, or another.
    """
    sizes = [size for size, _ in expected]
    if len(content) not in sizes:
        said = " or ".join(map(str, sizes)) or "none"
        raise StoreCorruptError(place, f"it has {len(content)} bytes, not {said}")
    if (len(content), zlib.crc32(content)) not in [tuple(each) for each in expected]:
        raise StoreCorruptError(place, "its crc32 is not the one in the manifest")


def check_frame(place: Place, content: bytes, limit: int) -> None:
    """Refuse a zstd frame that does not say its size, or says a larger one than can be.

    The header is that of RFC 8878, section 3.1.1.

    Raises:
        StoreCorruptError: With the size.
    """
    if content[:4] != b"\x28\xb5\x2f\xfd" or len(content) < 6:
        raise StoreCorruptError(place, "it does not begin as zstd does")
    descriptor = content[4]
    is_single = descriptor >> 5 & 1
    width = (is_single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(content[start : start + width], "little") + 256 * (width == 2)
    if width == 0 or size > limit:
        raise StoreCorruptError(place, f"its content would have {size or 'any number of'} bytes")


def check_strings(place: Place, content: bytes, count: int) -> None:
    """Refuse variable-length strings that are more or longer than the chunk can hold.

    Raises:
        StoreCorruptError: With what they state.
    """
    (said,) = struct.unpack_from("<I", content)
    if said != count:
        raise StoreCorruptError(place, f"it states {said} strings, not {count}")
    if len(content) < 4 + 4 * count:
        raise StoreCorruptError(place, f"its {len(content)} bytes cannot hold {count} strings")


def _codecs(
    place: Place, document: dict[str, Any], name: str, rows: int, rows_per_chunk: int
) -> tuple[str, ...]:
    """Return the names of the codecs of an array, if it is one that this program writes."""
    kind, first = "string", "vlen-utf8"
    if name in DTYPES:
        kind, first = DTYPES[name].name, "bytes"
    try:
        codecs = tuple(str(codec["name"]) for codec in document["codecs"])
        (length,) = document["shape"]
        (chunk,) = document["chunk_grid"]["configuration"]["chunk_shape"]
        endian = document["codecs"][0].get("configuration", {}).get("endian", "little")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreCorruptError(
            place, f"it does not describe an array of rows ({error!r})"
        ) from error
    found = (document.get("data_type"), chunk, endian)
    if found != (kind, rows_per_chunk, "little"):
        raise StoreCorruptError(
            place, f"it says {found}, not {(kind, rows_per_chunk, 'little')} (type, rows a chunk)"
        )
    if not isinstance(length, int) or length < rows:  # of a store that grew to its end, or did not
        raise StoreCorruptError(place, f"it has {length!r} rows, not {rows}")
    allowed = [(first, *rest) for rest in ((), ("zstd",), ("crc32c",), ("zstd", "crc32c"))]
    if codecs not in allowed:
        raise StoreCorruptError(place, f"it is written with {codecs}, not with {allowed[-1]}")
    return codecs


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
    *,
    checked: bool = True,
) -> None:
    """Make the empty array of that name, with a value for each row.

    Args:
        group: Of the store.
        name: `key`, `key_hash`, `caption/<field>`, `label` or `group`.
        rows: Of the store.
        rows_per_chunk: Of the store.
        class_names: Of the labels.
        checked: Whether chunks end in their crc32c; they do not in version 1.
    """
    packed = [] if name == KEY_HASH else [ZstdCodec()]  # hashes do not get shorter
    array = group.create_array(
        name,
        shape=(rows,),
        chunks=(rows_per_chunk,),
        dtype=DTYPES.get(name, "string"),
        compressors=[*packed, Crc32cCodec()] if checked else packed,
        fill_value=EMPTY.get(name, ""),
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
        write_block(group, {name: block[name] for name in names}, first)
        first = stop


def write_block(group: zarr.Group, block: Mapping[str, Any], first: int) -> None:
    """Write some rows, from one on, into the row arrays of a store that is made.

    The hashes of their keys are written too, where it has an array for them.
    """
    if "key" in block and KEY_HASH in group:
        block = {**block, KEY_HASH: key_hashes(block["key"], len(block["key"]))}
    with zarr.config.set({"array.write_empty_chunks": True}):  # so that a missing one is noticed
        for name, values in block.items():
            dtype: Any = DTYPES.get(name, STRINGS)
            rows = np.array(values, dtype=dtype)
            array = group[name]
            if isinstance(array, zarr.Array):
                array[first : first + len(rows)] = rows


def metadata_of_rows(names: Iterable[str]) -> set[str]:
    """Return the paths in a store of all groups and arrays that belong to no column."""
    paths = {"", "image", "text", *names}
    return paths | {path.rpartition("/")[0] for path in paths}


def write_store_manifest(folder: Path, names: Sequence[str], num_chunks: int) -> None:
    """Write the manifest of a store whose rows are all there, on local disk.

    Args:
        folder: Of the store.
        names: Of all its row arrays.
        num_chunks: Of each.
    """
    arrays = dict.fromkeys(sorted(names), num_chunks)
    write_manifest(folder, describe(folder, metadata_of_rows(names), arrays))


def key_hashes(keys: Iterable[str], count: int) -> UInt64[np.ndarray, "rows"]:
    """Return the first 8 bytes of the blake2b of each string as an unsigned number."""
    blake2b = hashlib.blake2b
    joined = b"".join(blake2b(str(key).encode(), digest_size=HASH_BYTES).digest() for key in keys)
    hashes = np.frombuffer(joined, dtype="<u8")
    if len(hashes) != count:
        raise ValueError(f"Got {len(hashes)} keys where {count} were said to come.")
    return hashes
