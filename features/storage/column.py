"""A column of features: chunks of float16 (or int8) rows, and a status for each row."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Float16, Float32, Int8, Int64, Shaped, UInt8
from zarr.codecs import BytesCodec, Crc32cCodec

from features.errors import StoreCorruptError
from features.status import Status
from features.storage.chunks import (
    CRC_BYTES,
    read_chunk,
    read_part,
    read_pieces,
    scatter_rows,
    write_chunk,
)
from features.storage.files import is_file, names, remove_leftovers
from features.storage.fingerprint import Fingerprint
from features.storage.identity import WORDS, Identities, Keys
from features.storage.manifest import (
    METADATA,
    Contents,
    Manifest,
    describe,
    digest_of,
    read_metadata,
)
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath, can_be_listed

GREATEST = 127
BLOCK_ROWS = 4096
"""Rows of a column that are in memory at once, where they are read in blocks."""
MOST = 10**11
"""More rows than a store can have."""
MOST_IN_CHUNK = 2**32
"""More numbers than a chunk can have: 8 GiB of float16."""
LAYOUT = ["bytes", "crc32c"]
"""Codecs of features."""


def quantise(
    features: Float16[np.ndarray, "rows dim"],
) -> tuple[Int8[np.ndarray, "rows dim"], Float32[np.ndarray, "rows"]]:
    """Round each row to the multiples of its greatest value / 127.

    Returns:
        The whole numbers, and the factor of each row; 0 where all of it is zero.
    """
    values = features.astype(np.float32)
    scale = np.abs(values).max(axis=1, initial=0) / np.float32(GREATEST)
    values /= np.where(scale > 0, scale, np.float32(1))[:, None]
    return np.rint(values).astype(np.int8), scale


def dequantise(
    values: Int8[np.ndarray, "rows dim"], scale: Float32[np.ndarray, "rows"]
) -> Float16[np.ndarray, "rows dim"]:
    """Return the features that whole numbers and the factors of their rows stand for."""
    features: np.ndarray = (values * scale[:, None]).astype(np.float16)
    return features


def encoder_of(column: str) -> str:
    """Return `image/<encoder>` or `text/<encoder>`, to which a column belongs."""
    return "/".join(column.split("/")[:2])


class Column:
    """The features of one encoder (and caption field) for every row, with a status for each."""

    def __init__(
        self,
        store: Place,
        name: str,
        *,
        rows: int | None = None,
        keys: Keys | None = None,
        sound: set[int] | None = None,
    ) -> None:
        """Open a column; `FeatureStore.column` does.

        Args:
            store: Where the store is.
            name: `image/<encoder>` or `text/<encoder>/<field>`.
            rows: Of the store; of the column if not given.
            keys: Of the store; if not given, chunks have no records of what they are (version 1).
            sound: Numbers of chunks whose features were found whole, which grow as they are read.

        Raises:
            StoreCorruptError: Its metadata are damaged.
        """
        self.name = name
        self.path = store / name
        self.is_remote = isinstance(store, RemotePath)
        """Under a URL: reading is waiting, and worth many threads."""
        encoder = encoder_of(name)
        about = read_metadata(store / encoder / METADATA, "group")
        features = read_metadata(self.path / "features" / METADATA, "array")
        manifest = None if keys is None else Manifest.open(store, name)
        if manifest is not None:
            manifest.check(encoder, about)
            manifest.check(f"{name}/features", features)
        self.dtype: np.dtype[Any]
        """Of the features in the store: float16, or int8 with a factor for each row in `scale`."""
        length, self.dim, self.rows_per_chunk, self.dtype = _described(
            self.path / "features" / METADATA, features
        )
        self.rows = length if rows is None else rows
        if self.rows > length:
            raise StoreCorruptError(self.path, f"it has {length} rows, the store has {rows}")
        self.fingerprint = Fingerprint(about["attributes"])
        self.identities: Identities | None = None
        """What each chunk is; None in a store of version 1."""
        if keys is not None:
            if manifest is None:
                raise StoreCorruptError(self.path / "manifest" / METADATA, "the file is missing")
            self.identities = Identities(self.path, name, keys, manifest.encoders(encoder))
        self._sound = set() if sound is None else sound

    @property
    def parts(self) -> Sequence["Column"]:
        """The columns of the store that it is made of: itself alone."""
        return (self,)

    @property
    def dims(self) -> tuple[int, ...]:
        """Lengths of the features of each of its parts."""
        return tuple(part.dim for part in self.parts)

    @property
    def is_scaled(self) -> bool:
        """Whether the features are whole numbers, to be multiplied by the `scale` of their row."""
        return bool(self.dtype == np.int8)

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of a row, with its factor if it has one."""
        return self.dim * self.dtype.itemsize + 4 * self.is_scaled

    @property
    def num_chunks(self) -> int:
        """Chunks of the column."""
        return -(-self.rows // self.rows_per_chunk)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the files of a chunk: features, status and identity, and scale for int8."""
        size = self.rows_per_chunk * (self.row_bytes + 1) + CRC_BYTES * (2 + self.is_scaled)
        return size + (4 * WORDS + CRC_BYTES) * (self.identities is not None)

    def features_file(self, chunk: int) -> Place:
        """Path of a chunk of features: (rows_per_chunk, dim) and 4 bytes of crc32c."""
        return self.path / "features" / "c" / str(chunk) / "0"

    def scale_file(self, chunk: int) -> Place:
        """Path of a chunk of factors: (rows_per_chunk,) float32 and 4 bytes of crc32c."""
        return self.path / "scale" / "c" / str(chunk)

    def status_file(self, chunk: int) -> Place:
        """Path of a chunk of status: (rows_per_chunk,) uint8 and 4 bytes of crc32c."""
        return self.path / "status" / "c" / str(chunk)

    def chunk_rows(self, chunk: int) -> int:
        """Rows of the store in a chunk; the last is filled up with zeros on disk."""
        return min(self.rows_per_chunk, self.rows - chunk * self.rows_per_chunk)

    def pending(self, among: Iterable[int] | None = None) -> list[int]:
        """Return the chunks that are not done, in order; of some chunks alone if they are given."""
        chunks = range(self.num_chunks) if among is None else sorted(among)
        done = set(self._done() if among is None else self._done(chunks))
        return [chunk for chunk in chunks if chunk not in done]

    def write(
        self,
        chunk: int,
        features: Float16[np.ndarray, "batch dim"],
        status: UInt8[np.ndarray, "batch"],
        images: int = 0,
    ) -> None:
        """Write a chunk and then its status; killed at any moment, the chunk is whole or pending.

        Where the column has int8 features, they are rounded.

        Args:
            chunk: Its number.
            features: Of its rows.
            status: Of its rows.
            images: The checksum of what the rows were made of, where it is known.

        Raises:
            ValueError: The rows are not those of the chunk.
        """
        expected = (self.chunk_rows(chunk), self.dim)
        if features.shape != expected or status.shape != expected[:1]:
            raise ValueError(
                f"Chunk {chunk} of {self.name} takes {expected}; got {features.shape} features "
                f"and {status.shape} status."
            )
        if self.is_scaled:
            values, scale = quantise(features)
            self.write_stored(chunk, values, status, scale, images)
        else:
            self.write_stored(chunk, features, status, None, images)

    def write_stored(
        self,
        chunk: int,
        values: Shaped[np.ndarray, "batch dim"],
        status: UInt8[np.ndarray, "batch"],
        scale: Float32[np.ndarray, "batch"] | None,
        images: int = 0,
    ) -> None:
        """Write the rows of a chunk as they are in a store: of its dtype, with their factors."""
        parts = {"features": values, "status": status}
        if scale is not None:
            parts["scale"] = scale.astype("<f4", copy=False)
        else:
            parts["features"] = values.astype("<f2", copy=False)
        padding = self.rows_per_chunk - len(status)
        padded = {name: _padded(part, padding) for name, part in parts.items()}
        files = {"features": self.features_file(chunk), "status": self.status_file(chunk)}
        if scale is not None:
            files = {"scale": self.scale_file(chunk), **files}
        crcs = {"scale": 0, "images": images}
        written: list[Place] = []
        for name, file in files.items():
            beside, after = self.path / name / str(chunk), written if name == "status" else ()
            if name == "status" and self.identities is not None:
                crc: int = google_crc32c.value(padded["status"])
                self.identities.write(chunk, status=crc, **crcs)
                written.append(self.identities.file(chunk))
            crcs[name] = write_chunk(file, padded[name], beside=beside, after=after)
            written.append(file)

    def checksum(self) -> str:
        """Return a sha256 over the crc32c of all chunks of features, of which 4 bytes are read.

        Raises:
            StoreCorruptError: A file is missing or cut off.
        """
        crcs = np.empty((self.num_chunks, CRC_BYTES), dtype=np.uint8)
        values = self.rows_per_chunk * self.dim * self.dtype.itemsize

        def read(chunk: int) -> None:
            read_part(self.features_file(chunk), values, crcs[chunk])

        for _ in in_order(read, range(self.num_chunks), at=self.path):
            pass
        return hashlib.sha256(crcs.tobytes()).hexdigest()

    def remove_leftovers(self) -> None:
        """Remove what killed writers left half-written; those at work are left alone."""
        for array in ("scale", "features", "identity", "status"):
            remove_leftovers(self.path / array)

    def status(self) -> UInt8[np.ndarray, "rows"]:
        """Return the status code of every row; 0 (pending) where a chunk is not done.

        Raises:
            StoreCorruptError: A file is damaged, or not the one that was written.
        """
        size = self.rows_per_chunk
        codes = np.zeros(self.num_chunks * size, dtype=np.uint8)

        def fill(chunk: int) -> None:
            self._read_status(chunk, codes[chunk * size : (chunk + 1) * size])

        for _ in in_order(fill, self._done(), at=self.path):
            pass
        return codes[: self.rows]

    def chunk_status(self, chunk: int) -> UInt8[np.ndarray, "rows"]:
        """Return the status code of every row of a chunk that is done.

        Raises:
            StoreCorruptError: The file is missing, damaged, or not the one that was written.
        """
        codes = np.zeros(self.rows_per_chunk, dtype=np.uint8)
        self._read_status(chunk, codes)
        return codes[: self.chunk_rows(chunk)]

    def _read_status(self, chunk: int, codes: UInt8[np.ndarray, "rows_per_chunk"]) -> None:
        crc = read_chunk(self.status_file(chunk), codes, verify=True)
        self._check(chunk, "status", crc, self.status_file(chunk))

    def read_into(
        self, chunk: int, buffer: Shaped[np.ndarray, "rows_per_chunk dim"], *, verify: bool = False
    ) -> int:
        """Fill a buffer of the column's dtype with a chunk; return how many of its rows are real.

        Raises:
            StoreCorruptError: The file is missing, cut off, another than was written, or (with
                `verify`) damaged.
        """
        crc = read_chunk(self.features_file(chunk), buffer, verify=verify)
        self._check(chunk, "features", crc, self.features_file(chunk))
        if verify:
            self._sound.add(chunk)
        return self.chunk_rows(chunk)

    def _check(self, chunk: int, part: str, crc32c: int, file: Place) -> None:
        if self.identities is not None:
            self.identities.check(chunk, part, crc32c, file)

    def read_pieces(
        self, chunk: int, buffer: Shaped[np.ndarray, "some_rows dim"], *, verify: bool = False
    ) -> Iterator[tuple[int, Shaped[np.ndarray, "_ dim"]]]:
        """Yield a chunk on local disk piece by piece; see `features.storage.chunks.read_pieces`."""
        file = Path(str(self.features_file(chunk)))
        expected = None if self.identities is None else self.identities.of(chunk).features
        yield from read_pieces(file, buffer, self.rows_per_chunk, verify=verify, expected=expected)

    def scatter(
        self,
        chunk: int,
        rows: Shaped[np.ndarray, "all_rows dim"],
        places: Int64[np.ndarray, "rows_per_chunk"],
    ) -> bool:
        """Read a chunk on local disk straight to places in `rows`; see `scatter_rows`."""
        return scatter_rows(Path(str(self.features_file(chunk))), rows, places)

    def read_scale_into(self, chunk: int, buffer: Float32[np.ndarray, "rows_per_chunk"]) -> None:
        """Fill a buffer with the factors of the rows of a chunk of int8 features.

        Raises:
            StoreCorruptError: The file is missing, cut off, damaged, or not the one that was
                written.
        """
        crc = read_chunk(self.scale_file(chunk), buffer, verify=True)
        self._check(chunk, "scale", crc, self.scale_file(chunk))

    def restored(
        self, chunk: int, values: Shaped[np.ndarray, "rows dim"], first: int = 0
    ) -> Float16[np.ndarray, "rows dim"]:
        """Return the features that rows of a chunk, as they are in the store, stand for.

        Args:
            chunk: Number of the chunk.
            values: Of the column's dtype.
            first: The row of the chunk that they begin with.
        """
        if not self.is_scaled:
            return values
        scale = np.empty(self.rows_per_chunk, dtype=np.float32)
        self.read_scale_into(chunk, scale)
        return dequantise(values, scale[first : first + len(values)])

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "batch dim"]:
        """Return rows `start` to `stop`; zeros where a row is pending or quarantined.

        A chunk is checked whole the first time that some of it is read.

        Raises:
            StoreCorruptError: A file is damaged, or not the one that was written.
        """
        stop = min(stop, self.rows)
        features = np.zeros((max(stop - start, 0), self.dim), dtype=np.float16)

        def fill(part: tuple[int, int, int]) -> None:
            chunk, first, last = part
            if is_file(self.status_file(chunk)):
                skipped = first - chunk * self.rows_per_chunk
                target = features[first - start : last - start]
                values = self._some(chunk, skipped, target)
                if self.is_scaled:
                    target[:] = self.restored(chunk, values, skipped)

        parts = _chunks_between(start, stop, self.rows_per_chunk)
        for _ in in_order(fill, parts, at=self.path):
            pass
        return features

    def read_stored(self, start: int, stop: int) -> Shaped[np.ndarray, "batch dim"]:
        """Return rows `start` to `stop` as they are in the store, of the column's dtype."""
        stop = min(stop, self.rows)
        values = np.zeros((max(stop - start, 0), self.dim), dtype=self.dtype)
        for chunk, first, last in _chunks_between(start, stop, self.rows_per_chunk):
            target = values[first - start : last - start]
            target[:] = self._some(chunk, first - chunk * self.rows_per_chunk, target)
        return values

    def read_scale(self, start: int, stop: int) -> Float32[np.ndarray, "batch"]:
        """Return the factors of rows `start` to `stop` of int8 features."""
        parts = []
        for chunk, first, last in _chunks_between(start, min(stop, self.rows), self.rows_per_chunk):
            factors = np.empty(self.rows_per_chunk, dtype=np.float32)
            self.read_scale_into(chunk, factors)
            begin = chunk * self.rows_per_chunk
            parts.append(factors[first - begin : last - begin])
        return np.concatenate(parts)

    def _some(
        self, chunk: int, skipped: int, target: Shaped[np.ndarray, "rows dim"]
    ) -> Shaped[np.ndarray, "rows dim"]:
        """Return some rows of a chunk, of the column's dtype: in `target` if it has that."""
        values = target if target.dtype == self.dtype else np.empty(target.shape, self.dtype)
        if chunk in self._sound:
            offset = skipped * self.dim * self.dtype.itemsize
            read_part(self.features_file(chunk), offset, values)
        elif len(values) == self.rows_per_chunk:
            self.read_into(chunk, values, verify=True)
        else:
            whole = np.empty((self.rows_per_chunk, self.dim), dtype=self.dtype)
            self.read_into(chunk, whole, verify=True)
            values[:] = whole[skipped : skipped + len(values)]
        return values

    def ok_rows(self) -> Int64[np.ndarray, "ok"]:
        """Return the rows that can be used, in order."""
        return np.flatnonzero(self.status() == Status.OK)

    def blocks(self, rows: Int64[np.ndarray, "rows"]) -> Iterator[Float16[np.ndarray, "some dim"]]:
        """Yield the features of rows that are in order, block by block."""
        for part in np.split(rows, np.flatnonzero(np.diff(rows // BLOCK_ROWS)) + 1):
            if len(part):
                first, last = int(part[0]), int(part[-1])
                yield self.read(first, last + 1)[part - first]

    def rows_at(self, rows: Int64[np.ndarray, "rows"]) -> Float16[np.ndarray, "rows dim"]:
        """Return the features of rows in any order; each part of the store is read once."""
        features = np.empty((len(rows), self.dim), dtype=np.float16)
        order, done = np.argsort(rows, kind="stable"), 0
        for block in self.blocks(rows[order]):
            features[order[done : done + len(block)]] = block
            done += len(block)
        return features

    def _done(self, among: Iterable[int] | None = None) -> list[int]:
        """Return the chunks that have a status, in order: listed, or asked for one by one."""
        if among is None and can_be_listed(self.path):
            listed = set(names(self.path / "status" / "c"))
            return [chunk for chunk in range(self.num_chunks) if str(chunk) in listed]
        chunks = range(self.num_chunks) if among is None else list(among)
        there = in_order(is_file, map(self.status_file, chunks), at=self.path)
        return [chunk for chunk, done in zip(chunks, there, strict=True) if done]


def create_column(
    group: zarr.Group,
    rows: int,
    dim: int,
    rows_per_chunk: int,
    *,
    dtype: str = "float16",
    identified: bool = True,
) -> tuple[str, ...]:
    """Make the empty arrays of a column: features and status, and scale for int8 features.

    Args:
        group: Of the column.
        rows: Of the store.
        dim: Length of a feature vector.
        rows_per_chunk: Of the store.
        dtype: Of the features.
        identified: Whether chunks have records of what they are; they have none in version 1.

    Returns:
        The names of the arrays.
    """
    row_array: dict[str, Any] = {
        "shape": (rows,),
        "chunks": (rows_per_chunk,),
        "filters": None,
        "compressors": [Crc32cCodec()],
        "fill_value": 0,
        "dimension_names": ["row"],
    }
    if dtype == "int8":
        group.create_array("scale", dtype="float32", **row_array)
    group.create_array(
        "features",
        shape=(rows, dim),
        chunks=(rows_per_chunk, dim),
        dtype=dtype,
        serializer=BytesCodec(endian="little" if dtype == "float16" else None),
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=["row", "feature"],
    )
    codes = {status.label: int(status) for status in Status}
    group.create_array("status", dtype="uint8", attributes={"codes": codes}, **row_array)
    if identified:
        create_identity(group, -(-rows // rows_per_chunk))
    arrays = ("scale", "features", "status", "identity")
    return arrays[dtype != "int8" : len(arrays) - (not identified)]


def create_identity(group: zarr.Group, num_chunks: int, *, overwrite: bool = False) -> None:
    """Make the empty array of what each chunk of a column is."""
    group.create_array(
        "identity",
        shape=(num_chunks, WORDS),
        chunks=(1, WORDS),
        dtype="uint32",
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=["chunk", "word"],
        overwrite=overwrite,
    )


def describe_column(
    folder: Path,
    name: str,
    arrays: Iterable[str],
    *,
    part: str = "",
    encoder: Mapping[str, Any] | None = None,
) -> Contents:
    """Return what the manifest of a column says.

    Args:
        folder: On local disk, with the metadata of the column.
        name: Of the column.
        arrays: Of the column.
        part: Path in the store of the folder.
        encoder: Metadata of the encoder, if they are not in the folder.
    """
    paths = [name, *(f"{name}/{array}" for array in arrays)]
    if encoder is None:
        paths.append(encoder_of(name))
    contents = describe(folder, set(paths), {}, part=part)
    if encoder is not None:
        contents["metadata"][f"{encoder_of(name)}/{METADATA}"] = digest_of(encoder)
    return contents


def pending_in_any(columns: Sequence[Column], among: Iterable[int] | None = None) -> list[int]:
    """Return the chunks that are not done in some column, in order; of some alone if given."""
    chunks = None if among is None else set(among)
    return sorted(set().union(*(column.pending(chunks) for column in columns)))


def _chunks_between(start: int, stop: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (chunk, first row, row after the last) of each chunk that `start:stop` touches."""
    while start < stop:
        chunk = start // size
        last = min(stop, (chunk + 1) * size)
        yield chunk, start, last
        start = last


def _padded(values: np.ndarray, padding: int) -> np.ndarray:
    if padding == 0:
        return np.ascontiguousarray(values)
    return np.concatenate([values, np.zeros((padding, *values.shape[1:]), dtype=values.dtype)])


def _described(place: Place, document: dict[str, Any]) -> tuple[int, int, int, np.dtype[Any]]:
    """Return rows, length of a vector, rows of a chunk and dtype that metadata state."""
    try:
        rows, dim = document["shape"]
        chunk, width = document["chunk_grid"]["configuration"]["chunk_shape"]
        names = [str(codec["name"]) for codec in document["codecs"]]
        endian = document["codecs"][0].get("configuration", {}).get("endian", "little")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreCorruptError(place, f"it does not describe features ({error!r})") from error
    numbers = [rows, dim, chunk, width]
    are_possible = all(type(each) is int and 0 <= each <= MOST for each in numbers)
    if not are_possible or not 0 < dim * chunk <= MOST_IN_CHUNK:
        raise StoreCorruptError(
            place, f"its shape {[rows, dim]}, chunks {[chunk, width]} cannot be"
        )
    dtype, layout = document.get("data_type"), (width, names, endian)
    if dtype not in ("float16", "int8") or layout != (dim, LAYOUT, "little"):
        raise StoreCorruptError(
            place, f"it is {dtype} of {layout}, not float16 or int8 of {(dim, LAYOUT, 'little')}"
        )
    return rows, dim, chunk, np.dtype(dtype)
