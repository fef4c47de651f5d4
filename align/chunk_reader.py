"""Reads whole chunks of a store into memory that is used again, on the host or on a GPU."""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Float16, Int64, Shaped
from torch import Tensor

from align.columns import Columns
from features.device.cuda import is_gpu, record, room_for, to_device
from features.errors import StoreCorruptError
from features.storage.chunks import CRC_BYTES, read_chunk, write_chunk
from features.storage.column import Column
from features.storage.files import remove_leftovers
from features.storage.rows import key_hashes

logger = logging.getLogger(__name__)


class ChunkCache:
    """A folder on local disk that keeps chunks of remote stores, up to a number of bytes.

    Chunks are added until the folder is full and none is evicted: every epoch reads all chunks in
    another order, and then no rule of eviction has more hits than this one.
    """

    def __init__(self, folder: Path, max_bytes: int, *, processes: int = 1) -> None:
        """Measure the folder.

        Args:
            folder: Where the chunks are; those of several stores may share it.
            max_bytes: Limit of all files in it together.
            processes: Number of processes that share the bytes that are left.
        """
        self._folder = folder
        for of_column in folder.glob("*/"):
            remove_leftovers(of_column)
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self._left = (max_bytes - used) // processes
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}

    def read_into(self, columns: Columns, column: Column, chunk: int, buffer: np.ndarray) -> bool:
        """Fill a buffer with a cached chunk; return False if it is not cached, or damaged."""
        file = self._file(columns, column, chunk)
        if not file.is_file():
            return False
        try:
            read_chunk(file, buffer, verify=True)
        except StoreCorruptError as error:
            logger.warning("%s It is read from the store again.", error)
            file.unlink(missing_ok=True)
            return False
        return True

    def add(self, columns: Columns, column: Column, chunk: int, values: np.ndarray) -> None:
        """Keep a chunk, if there is room. A failure to write is logged, and ends the caching."""
        size = values.nbytes + CRC_BYTES
        with self._lock:
            if size > self._left:
                return
            self._left -= size
        file = self._file(columns, column, chunk)
        try:
            write_chunk(file, values, beside=file)
        except OSError as error:
            self._left = 0
            logger.warning("no more chunks are kept in %s: %s", self._folder, error)

    def _file(self, columns: Columns, column: Column, chunk: int) -> Path:
        """Name the file of a chunk by its store, its keys and its encoder's fingerprint."""
        if column.name not in self._names:
            store = columns.store
            made_of = [str(column.path), store.keys_sha256, store.rows, str(column.dtype)]
            known = json.dumps([*made_of, column.fingerprint], sort_keys=True)
            self._names[column.name] = hashlib.sha256(known.encode()).hexdigest()[:32]
        return self._folder / self._names[column.name] / str(chunk)


class RowsInMemory:
    """Rows of a column on the host or on a GPU: the parts of a joined column each by themselves."""

    def __init__(
        self, rows: int, column: Column, memory: torch.device, device: torch.device
    ) -> None:
        """Allocate; see `PartInMemory`."""
        self.parts = [
            PartInMemory((rows, part.dim), part.dtype, memory, device) for part in column.parts
        ]
        self._spans = [
            slice(stop - dim, stop)
            for stop, dim in zip(accumulate(column.dims), column.dims, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.parts[0].values)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)

    def gather(self, rows: Int64[np.ndarray, "batch"], out: Float16[Tensor, "batch dim"]) -> None:
        """Copy rows into the memory of a batch."""
        for part, span in zip(self.parts, self._spans, strict=True):
            part.gather(rows, out[:, span])

    def copy(self, rows: slice, out: Float16[Tensor, "batch dim"]) -> None:
        """Copy consecutive rows into the memory of a batch."""
        for part, span in zip(self.parts, self._spans, strict=True):
            part.copy(rows, out[:, span])

    def view(self, rows: slice) -> Float16[Tensor, "batch dim"] | None:
        """Return consecutive rows where they lie, None if they must be copied."""
        first = self.parts[0]
        return first.values[rows] if len(self.parts) == 1 and first.scale is None else None


class PartInMemory:
    """Rows of features on the host or on a GPU; int8 rows have their factors beside them.

    If the rows are on the host and the batches on a GPU, rows are gathered into pinned memory and
    copied from there; int8 rows are multiplied by their factors on the GPU.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: np.dtype, memory: torch.device, device: torch.device
    ) -> None:
        """Allocate.

        Args:
            shape: Number of rows, and length of a row.
            dtype: Of the store: float16 or int8.
            memory: Device of the rows.
            device: Device of the batches.
        """
        self._memory = memory
        self._device = device
        self._pin = is_gpu(device) and not is_gpu(memory)
        self.values = self._empty(*shape, dtype=torch.int8 if dtype == np.int8 else torch.float16)
        self.scale: Tensor | None = None
        if dtype == np.int8:
            self.scale = self._empty(shape[0], dtype=torch.float32)
        self._gathered = torch.empty(0)
        self._copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def gather(self, rows: Int64[np.ndarray, "batch"], out: Float16[Tensor, "batch dim"]) -> None:
        """Copy rows into the memory of a batch."""
        index = to_device(torch.from_numpy(np.ascontiguousarray(rows)), self._memory)
        if self.scale is None and not self._pin:
            torch.index_select(self.values, 0, index, out=out)
            return
        if self._copied is not None:
            self._copied.synchronize()  # what was gathered before may still be on its way
        if len(self._gathered) < len(rows):
            self._gathered = self._empty(*out.shape, dtype=self.values.dtype)
        values = torch.index_select(self.values, 0, index, out=self._gathered[: len(rows)])
        scale = None if self.scale is None else torch.index_select(self.scale, 0, index)
        _restore(values, scale, out)
        if self._pin:
            self._copied = record(self._device)

    def copy(self, part: slice, out: Float16[Tensor, "batch dim"]) -> None:
        """Copy consecutive rows into the memory of a batch."""
        _restore(self.values[part], None if self.scale is None else self.scale[part], out)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if self._pin:
            return room_for(self._device, shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self._memory)


def _restore(values: Tensor, scale: Tensor | None, out: Float16[Tensor, "batch dim"]) -> None:
    if scale is None:
        out.copy_(values, non_blocking=True)
    else:
        values = values.to(out.device, non_blocking=True)
        torch.mul(values, to_device(scale, out.device)[:, None], out=out)


READERS = 4  # threads that read chunks: enough to keep a local disk busy
REMOTE_READERS = 16  # under a URL they mostly wait
PIECE_BYTES = 1 << 21  # read at once from local disk: it stays in the processor's cache


class ChunkReader:
    """Reads chunks of one store into host or GPU memory.

    Chunks are copied to a GPU from pinned memory on a stream of their own, while training goes on.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        verify: bool,
        memory: torch.device,
        threads: int,
        cache: ChunkCache | None = None,
    ) -> None:
        """Count the buffers, one per thread; each is allocated when it is first used.

        Args:
            columns: The columns of the store.
            verify: Whether to check the crc32c of each chunk the first time that it is read.
            memory: Device of the memory that is read into.
            threads: Number of threads that read at once.
            cache: Keeps chunks of remote stores on local disk.
        """
        self._cache = cache
        self.columns = columns
        self.memory = memory
        self.threads = threads
        self._checked = {
            part.name: np.full(part.num_chunks, not verify)
            for column in (columns.image, *columns.text)
            for part in column.parts
        }
        self._on_gpu = is_gpu(memory)
        self._stream = torch.cuda.Stream(memory) if self._on_gpu else None  # type: ignore[no-untyped-call]
        is_remote = any(column.is_remote for column in (columns.image, *columns.text))
        whole = largest_chunk(columns)
        self._buffer_bytes = whole if self._on_gpu or is_remote else min(whole, PIECE_BYTES)
        self._buffers: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(threads):
            self._buffers.put(None)

    def read(self, column: Column, chunk: int, rows: RowsInMemory, first: int) -> None:
        """Read a chunk into consecutive rows.

        Args:
            column: Of the image or of a caption field.
            chunk: Number of the chunk.
            rows: The memory.
            first: Row of the memory that the first row of the chunk goes to.

        Raises:
            StoreCorruptError: The chunk is not what was written.
        """
        for part, into in zip(column.parts, rows.parts, strict=True):
            self._read(part, chunk, into, first)

    def _read(self, column: Column, chunk: int, rows: PartInMemory, first: int) -> None:
        part = slice(first, first + column.rows_per_chunk)
        if not self._on_gpu:
            self._read_into(column, chunk, rows.values[part])
            if rows.scale is not None:
                column.read_scale_into(chunk, rows.scale[part].numpy())
            return
        with self._buffer(column) as pinned:
            self._read_into(column, chunk, pinned)
            with self._copying():
                rows.values[part].copy_(pinned, non_blocking=True)
                if rows.scale is not None:
                    rows.scale[part].copy_(self._scale(column, chunk))

    def scatter(
        self, column: Column, chunk: int, rows: RowsInMemory, places: Int64[np.ndarray, "rows"]
    ) -> None:
        """Read a chunk and put each of its rows at a place of its own.

        Args:
            column: Of the image or of a caption field.
            chunk: Number of the chunk.
            rows: The memory.
            places: Row of the memory that each row of the chunk goes to.

        Raises:
            StoreCorruptError: The chunk is not what was written.
        """
        for part, into in zip(column.parts, rows.parts, strict=True):
            self._scatter(part, chunk, into, places)

    def _scatter(
        self, column: Column, chunk: int, rows: PartInMemory, places: Int64[np.ndarray, "rows"]
    ) -> None:
        if rows.scale is not None:
            self._put(rows.scale, places, self._scale(column, chunk))
        straight = not self._on_gpu and not column.is_remote and self._checked[column.name][chunk]
        if straight and column.scatter(chunk, rows.values.numpy(), places):
            return
        with self._buffer(column) as buffer:
            for first, values in self._pieces(column, chunk, buffer):
                self._put(rows.values, places[first : first + len(values)], values)

    def _put(
        self,
        rows: Shaped[Tensor, "all_rows *dim"],
        places: Int64[np.ndarray, "some_rows"],
        values: Shaped[Tensor, "some_rows *dim"],
    ) -> None:
        if not self._on_gpu:
            _as_items(rows)[places] = _as_items(values)  # numpy copies rows whole; torch does not
            return
        with self._copying():
            index = to_device(torch.from_numpy(places), self.memory)
            rows.index_copy_(0, index, values.to(self.memory, non_blocking=True))

    def _pieces(
        self, column: Column, chunk: int, buffer: Shaped[Tensor, "some_rows dim"]
    ) -> Iterator[tuple[int, Shaped[Tensor, "_ dim"]]]:
        """Yield the rows of a chunk, as many at once as the buffer holds, and the first of them."""
        if len(buffer) == column.rows_per_chunk:
            self._read_into(column, chunk, buffer)
            yield 0, buffer
            return
        checked = self._checked[column.name]
        for first, values in column.read_pieces(chunk, buffer.numpy(), verify=not checked[chunk]):
            yield first, torch.from_numpy(values)
        checked[chunk] = True

    def _read_into(self, column: Column, chunk: int, values: Tensor) -> None:
        cache = self._cache if column.is_remote else None
        if cache is not None and cache.read_into(self.columns, column, chunk, values.numpy()):
            return
        checked = self._checked[column.name]
        column.read_into(chunk, values.numpy(), verify=not checked[chunk])
        checked[chunk] = True
        if cache is not None:
            cache.add(self.columns, column, chunk, values.numpy())

    def _scale(self, column: Column, chunk: int) -> Tensor:
        factors = np.empty(column.rows_per_chunk, dtype=np.float32)
        column.read_scale_into(chunk, factors)
        return torch.from_numpy(factors)

    @contextmanager
    def _buffer(self, column: Column) -> Iterator[Tensor]:
        """Lend a buffer as large as a chunk of a column, or as a piece of one."""
        memory = self._buffers.get()
        try:
            if memory is None:
                memory = room_for(self.memory, [self._buffer_bytes], torch.uint8)
            row_bytes = column.dim * column.dtype.itemsize
            rows = min(column.rows_per_chunk, len(memory) // row_bytes)
            dtype = torch.int8 if column.is_scaled else torch.float16
            yield memory[: rows * row_bytes].view(dtype).view(rows, column.dim)
        finally:
            self._buffers.put(memory)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Copy on the stream of this reader; wait until the copies are done."""
        with torch.cuda.stream(self._stream):
            yield
            copied = record(self.memory)
        copied.synchronize()


def largest_chunk(columns: Columns) -> int:
    """Compute the bytes of the largest chunk of features of any column."""
    return max(
        part.rows_per_chunk * part.dim * part.dtype.itemsize
        for column in (columns.image, *columns.text)
        for part in column.parts
    )


def caption_hashes(columns: Columns, field: int, chunk: int) -> Int64[np.ndarray, "rows"]:
    """Hash the caption of each row of a chunk: equal strings have equal hashes."""
    store, size = columns.store, columns.image.rows_per_chunk
    start, stop = chunk * size, min((chunk + 1) * size, store.rows)
    words = store.captions(columns.fields[field], start, stop)
    hashes: np.ndarray = key_hashes(words, stop - start).view(np.int64)
    return hashes


def _as_items(rows: Tensor) -> np.ndarray:
    """View rows as one array of items, each the bytes of a row."""
    values = rows.numpy().reshape(len(rows), -1)
    return values.view(f"V{values.shape[1] * values.itemsize}").ravel()
