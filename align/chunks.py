"""Reads whole chunks of a store into memory that is used again, on the host or on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from align.cache import ChunkCache
from align.rows import RowsInMemory
from align.selection import Columns
from features.column import Column
from features.keys import key_hashes

READERS = 4  # threads that read chunks: enough to keep a local disk busy
REMOTE_READERS = 16  # under a URL they mostly wait
PIECE_BYTES = 1 << 21  # read at once from local disk: it stays in the processor's cache


class ChunkReader:
    """What the rows of one store are read by.

    Chunks come to a GPU through pinned memory on a stream of their own, so that training goes on
    meanwhile.
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
        """Prepare buffers, which are taken when they are first used.

        Args:
            columns: What is read.
            verify: Whether to check the crc32c of each chunk the first time that it is read.
            memory: Where the rows go.
            threads: How many may read at once.
            cache: Keeps chunks of remote stores on local disk.
        """
        self._cache = cache
        self.columns = columns
        self.memory = memory
        self.threads = threads
        self._checked = {
            column.name: np.full(column.num_chunks, not verify)
            for column in (columns.image, *columns.text)
        }
        self._on_gpu = memory.type == "cuda"
        self._stream = torch.cuda.Stream(memory) if self._on_gpu else None  # type: ignore[no-untyped-call]
        is_remote = any(column.is_remote for column in (columns.image, *columns.text))
        whole = largest_chunk(columns)
        self._buffer_bytes = whole if self._on_gpu or is_remote else min(whole, PIECE_BYTES)
        self._buffers: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(threads):
            self._buffers.put(None)

    def read(self, column: Column, chunk: int, rows: RowsInMemory, first: int) -> None:
        """Read a chunk to where its rows stand one behind the other.

        Args:
            column: Of the image or of a caption field.
            chunk: Number of the chunk.
            rows: The memory.
            first: Where the first row goes.

        Raises:
            StoreCorruptError: The chunk is not what was written.
        """
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
        """Read a chunk and put each of its rows at a place.

        Args:
            column: Of the image or of a caption field.
            chunk: Number of the chunk.
            rows: The memory.
            places: Of each row of the chunk.

        Raises:
            StoreCorruptError: The chunk is not what was written.
        """
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
            index = torch.from_numpy(places).to(self.memory)
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
        """Lend a buffer for a chunk of a column, or for a piece of it."""
        memory = self._buffers.get()
        try:
            if memory is None:
                memory = torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
            row_bytes = column.dim * column.dtype.itemsize
            rows = min(column.rows_per_chunk, len(memory) // row_bytes)
            dtype = torch.int8 if column.is_scaled else torch.float16
            yield memory[: rows * row_bytes].view(dtype).view(rows, column.dim)
        finally:
            self._buffers.put(memory)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Let the GPU copy on the stream of this reader; wait until it has."""
        with torch.cuda.stream(self._stream):
            yield
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        copied.synchronize()


def largest_chunk(columns: Columns) -> int:
    """Return the bytes of the largest chunk of features of any column."""
    return max(
        column.rows_per_chunk * column.dim * column.dtype.itemsize
        for column in (columns.image, *columns.text)
    )


def caption_hashes(columns: Columns, field: int, chunk: int) -> Int64[np.ndarray, "rows"]:
    """Return a hash of the caption of each row of a chunk: equal where the words are."""
    store, size = columns.text_store, columns.image.rows_per_chunk
    start, stop = chunk * size, min((chunk + 1) * size, store.rows)
    words = store.captions(columns.fields[field], start, stop)
    hashes: np.ndarray = key_hashes(words, stop - start).view(np.int64)
    return hashes


def _as_items(rows: Tensor) -> np.ndarray:
    """Return rows as one array of items, each the bytes of a row."""
    values = rows.numpy().reshape(len(rows), -1)
    return values.view(f"V{values.shape[1] * values.itemsize}").ravel()
