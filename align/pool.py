"""Memory for one window of chunks: filled from the store by a few threads, gathered from by row."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from align.chunks import ChunkReader
from align.order import Window
from align.selection import key_hashes


class Pool:
    """The features, and on request the caption ids, of the chunks of one window."""

    def __init__(
        self,
        reader: ChunkReader,
        slots: int,
        *,
        with_caption_ids: bool,
        memory: torch.device,
        device: torch.device,
    ) -> None:
        """Take memory for a number of chunks; a window that has more of them takes more.

        Args:
            reader: Reads the chunks.
            slots: How many.
            with_caption_ids: Whether the captions are hashed too.
            memory: Where the chunks lie.
            device: Where the batches lie.
        """
        self.columns = reader.columns
        self.memory = memory
        self._reader = reader
        self._image = RowsInMemory(self.columns.image.dtype, memory, device)
        self._text = RowsInMemory(self.columns.text[0].dtype, memory, device)
        self._with_caption_ids = with_caption_ids
        self._take_memory(slots)
        self._chunks: np.ndarray | None = None
        self._used: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks that can be here."""
        ids = 0 if self._caption_ids is None else self._caption_ids.nbytes
        return self._image.nbytes + self._text.nbytes + ids

    def fill(self, window: Window) -> None:
        """Read the chunks of a window, unless they are here already.

        Raises:
            StoreCorruptError: A chunk is not what was written.
        """
        if self._chunks is not None and np.array_equal(self._chunks, window.chunks):
            return
        if self._used is not None:
            self._used.synchronize()  # batches may still be gathered from here
        self._chunks = None
        if len(window.chunks) > self._slots:
            self._take_memory(len(window.chunks))
        jobs = list(enumerate(window.chunks.tolist()))
        with ThreadPoolExecutor(self._reader.threads, "sail-read") as readers:
            reads = [readers.submit(self._read_chunk, slot, chunk) for slot, chunk in jobs]
            beside = jobs if self.columns.text[0].is_remote else []  # reading them is waiting too
            reads += [readers.submit(self._hash_captions, *job) for job in beside]
            try:
                for slot, chunk in [] if beside else jobs:
                    self._hash_captions(slot, chunk)
                for read in reads:
                    read.result()
            finally:
                for read in reads:
                    read.cancel()  # of no use after a chunk that cannot be read
        self._chunks = window.chunks

    def gather(
        self,
        positions: Int64[np.ndarray, "batch"],
        fields: Int64[np.ndarray, "batch fields"],
        image: Float16[Tensor, "batch image_dim"],
        text: Float16[Tensor, "batch fields text_dim"],
    ) -> None:
        """Copy rows, and the given caption fields of each, into the memory of a batch."""
        captions = fields * (self._slots * self._size) + positions[:, None]
        self._image.gather(positions, image)
        self._text.gather(captions.reshape(-1), text.flatten(0, 1))

    def caption_ids(
        self, positions: Int64[np.ndarray, "batch"], fields: Int64[np.ndarray, "batch fields"]
    ) -> Int64[np.ndarray, "batch fields"] | None:
        """Return the caption ids of rows, None where the pool has none."""
        return None if self._caption_ids is None else self._caption_ids[positions[:, None], fields]

    def mark_used(self) -> None:
        """Say that nothing more will be gathered from the chunks that are here."""
        if self.memory.type == "cuda":
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used.record()

    def _take_memory(self, slots: int) -> None:
        self._size = self.columns.image.rows_per_chunk
        self._slots = slots
        rows, fields = slots * self._size, len(self.columns.text)
        self._image.take_memory(rows, self.columns.image.dim)
        self._text.take_memory(fields * rows, self.columns.text[0].dim)
        ids = np.empty((rows, fields), dtype=np.int64)
        self._caption_ids = ids if self._with_caption_ids else None

    def _read_chunk(self, slot: int, chunk: int) -> None:
        targets = [(self.columns.image, self._image, slot)]
        for field, column in enumerate(self.columns.text):
            targets.append((column, self._text, field * self._slots + slot))
        for column, rows, place in targets:
            part = slice(place * self._size, (place + 1) * self._size)
            scale = None if rows.scale is None else rows.scale[part]
            self._reader.read(column, chunk, rows.values[part], scale)

    def _hash_captions(self, slot: int, chunk: int) -> None:
        if self._caption_ids is None:
            return
        store, size = self.columns.text_store, self._size
        start, stop = chunk * size, min((chunk + 1) * size, store.rows)
        for field, name in enumerate(self.columns.fields):
            hashes = key_hashes(store.captions(name, start, stop), stop - start)
            rows = self._caption_ids[slot * size : slot * size + stop - start]
            rows[:, field] = hashes.view(np.int64)


class RowsInMemory:
    """Rows of features as they are on disk, and how to make a batch of some of them.

    Where the memory is that of the host and the batch is on a GPU, rows are gathered into pinned
    memory and copied; int8 features are multiplied by the factors of their rows on the device.
    """

    def __init__(self, dtype: np.dtype, memory: torch.device, device: torch.device) -> None:
        self.values = torch.empty(0, dtype=torch.int8 if dtype == np.int8 else torch.float16)
        self.scale: Tensor | None = None
        self._memory = memory
        self._device = device
        self._pin = memory.type == "cpu" and device.type == "cuda"
        self._gathered = self.values
        self._copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def take_memory(self, rows: int, dim: int) -> None:
        """Make room for rows; what there was is given back first."""
        self.values, dtype = torch.empty(0), self.values.dtype
        self.values = self._empty(rows, dim, dtype=dtype)
        if dtype == torch.int8:
            self.scale = self._empty(rows, dtype=torch.float32)

    def gather(self, rows: Int64[np.ndarray, "batch"], out: Float16[Tensor, "batch dim"]) -> None:
        """Copy rows into the memory of a batch."""
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self._memory)
        if self.scale is None and self._memory == self._device:
            torch.index_select(self.values, 0, index, out=out)
            return
        if self._copied is not None:
            self._copied.synchronize()  # what was gathered before may still be on its way
        if len(self._gathered) < len(rows):
            self._gathered = self._empty(*out.shape, dtype=self.values.dtype)
        values = torch.index_select(self.values, 0, index, out=self._gathered[: len(rows)])
        if self.scale is None:
            out.copy_(values, non_blocking=True)
        else:
            scale = torch.index_select(self.scale, 0, index).to(self._device)
            values = values.to(self._device, non_blocking=True)
            torch.mul(values, scale[:, None], out=out)
        if self._pin:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._memory, pin_memory=self._pin)
