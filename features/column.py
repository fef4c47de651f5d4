"""A column of features on disk: chunks of float16 rows, and a status for each row."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Float16, UInt8
from zarr.codecs import BytesCodec, Crc32cCodec

from features.errors import StoreCorruptError
from features.partial import partial_path, remove_leftovers
from features.status import Status

CRC_BYTES = 4


class Column:
    """The features of one encoder (and caption field) for every row, with a status for each."""

    def __init__(self, store: Path, name: str, *, verify: bool = False) -> None:
        self.name = name
        self.path = store / name
        self.verify = verify
        """Check the crc32c of every chunk that is read as a whole."""
        array = zarr.open_array(self.path / "features", mode="r")
        self.rows, self.dim = array.shape
        self.rows_per_chunk = array.chunks[0]
        self.fingerprint: dict[str, Any] = zarr.open_group(
            store / "/".join(name.split("/")[:2]), mode="r"
        ).attrs.asdict()

    @property
    def num_chunks(self) -> int:
        """Chunks of the column."""
        return -(-self.rows // self.rows_per_chunk)

    def features_file(self, chunk: int) -> Path:
        """Path of a chunk of features: (rows_per_chunk, dim) float16 and 4 bytes of crc32c."""
        return self.path / "features" / "c" / str(chunk) / "0"

    def status_file(self, chunk: int) -> Path:
        """Path of a chunk of status: (rows_per_chunk,) uint8 and 4 bytes of crc32c."""
        return self.path / "status" / "c" / str(chunk)

    def chunk_rows(self, chunk: int) -> int:
        """Rows of the store in a chunk; the last is filled up with zeros on disk."""
        return min(self.rows_per_chunk, self.rows - chunk * self.rows_per_chunk)

    def pending(self, among: Iterable[int] | None = None) -> list[int]:
        """Return the chunks that are not done, in order; of some chunks alone if they are given."""
        chunks = range(self.num_chunks) if among is None else sorted(among)
        return [chunk for chunk in chunks if not self.status_file(chunk).is_file()]

    def write(
        self,
        chunk: int,
        features: Float16[np.ndarray, "batch dim"],
        status: UInt8[np.ndarray, "batch"],
    ) -> None:
        """Write a chunk and then its status; killed at any moment, the chunk is whole or pending.

        Raises:
            ValueError: The rows are not those of the chunk.
        """
        expected = (self.chunk_rows(chunk), self.dim)
        if features.shape != expected or status.shape != expected[:1]:
            raise ValueError(
                f"Chunk {chunk} of {self.name} takes {expected}; got {features.shape} features "
                f"and {status.shape} status."
            )
        padding = self.rows_per_chunk - len(features)
        little_endian = features.astype("<f2", copy=False)
        for array, file, values in [
            ("features", self.features_file(chunk), little_endian),
            ("status", self.status_file(chunk), status),
        ]:
            partial = partial_path(self.path / array / str(chunk))
            _write_file(file, _padded(values, padding), partial)

    def remove_leftovers(self) -> None:
        """Remove what killed writers left half-written; those at work are left alone."""
        for array in ("features", "status"):
            remove_leftovers(self.path / array)

    def status(self) -> UInt8[np.ndarray, "rows"]:
        """Return the status code of every row; 0 (pending) where a chunk is not done."""
        codes = np.zeros(self.num_chunks * self.rows_per_chunk, dtype=np.uint8)
        for chunk in range(self.num_chunks):
            if self.status_file(chunk).is_file():
                start = chunk * self.rows_per_chunk
                _read_file(
                    self.status_file(chunk), codes[start : start + self.rows_per_chunk], verify=True
                )
        return codes[: self.rows]

    def read_into(self, chunk: int, buffer: Float16[np.ndarray, "rows_per_chunk dim"]) -> int:
        """Fill a buffer with a chunk, without a copy, and return how many of its rows are real.

        Raises:
            StoreCorruptError: The file is missing, cut off, or (with `verify`) damaged.
        """
        _read_file(self.features_file(chunk), buffer, verify=self.verify)
        return self.chunk_rows(chunk)

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "batch dim"]:
        """Return rows `start` to `stop`; zeros where a row is pending or quarantined."""
        stop = min(stop, self.rows)
        features = np.zeros((max(stop - start, 0), self.dim), dtype=np.float16)
        for chunk, first, last in _chunks_between(start, stop, self.rows_per_chunk):
            if not self.status_file(chunk).is_file():
                continue
            base = chunk * self.rows_per_chunk
            with _open_chunk(self.features_file(chunk)) as file:
                file.seek((first - base) * self.dim * 2)
                target = features[first - start : last - start]
                if file.readinto(target.reshape(-1).view(np.uint8).data) != target.nbytes:
                    raise StoreCorruptError(self.features_file(chunk), "the file is cut off")
        return features


def create_column(group: zarr.Group, rows: int, dim: int, rows_per_chunk: int) -> None:
    """Make the two empty arrays of a column."""
    group.create_array(
        "features",
        shape=(rows, dim),
        chunks=(rows_per_chunk, dim),
        dtype="float16",
        serializer=BytesCodec(endian="little"),
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=["row", "feature"],
    )
    group.create_array(
        "status",
        shape=(rows,),
        chunks=(rows_per_chunk,),
        dtype="uint8",
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=["row"],
        attributes={"codes": {status.label: int(status) for status in Status}},
    )


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


def _checksum(values: np.ndarray) -> bytes:
    crc: int = google_crc32c.value(values.reshape(-1).view(np.uint8))
    return crc.to_bytes(CRC_BYTES, "little")


def _write_file(path: Path, values: np.ndarray, partial: Path) -> None:
    """Write values and their checksum under another name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb", buffering=0) as file:
        file.write(values.reshape(-1).view(np.uint8).data)
        file.write(_checksum(values))
    os.replace(partial, path)  # noqa: PTH105 - Path.replace is the same call with a longer trace


def _open_chunk(path: Path) -> Any:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise StoreCorruptError(path, "the file is missing although its rows are done") from error


def _read_file(path: Path, buffer: np.ndarray, *, verify: bool) -> None:
    with _open_chunk(path) as file:
        count = file.readinto(buffer.reshape(-1).view(np.uint8).data)
        checksum = file.read(CRC_BYTES + 1)
    if count != buffer.nbytes or len(checksum) != CRC_BYTES:
        size = count + len(checksum)
        raise StoreCorruptError(path, f"it has {size} bytes, not {buffer.nbytes + CRC_BYTES}")
    if verify and checksum != _checksum(buffer):
        raise StoreCorruptError(path, "its crc32c does not match its bytes")
