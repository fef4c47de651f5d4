"""Memory for one window of chunks: filled from the store by a few threads, gathered from by row."""

from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from align.order import Window
from align.selection import Columns, key_hashes
from features.column import Column

READERS = 4  # threads that read chunks: enough to keep a local disk busy
REMOTE_READERS = 16  # under a URL they mostly wait


class Pool:
    """The features, and on request the caption ids, of the chunks of one window.

    On a GPU the features lie on the device; chunks come there through pinned memory on a stream of
    their own, so that training goes on meanwhile.
    """

    def __init__(
        self, columns: Columns, slots: int, *, with_caption_ids: bool, device: torch.device
    ) -> None:
        """Take memory for a number of chunks; a window that has more of them takes more."""
        self.columns = columns
        self.device = device
        self._with_caption_ids = with_caption_ids
        self._take_memory(slots)
        self._chunks: np.ndarray | None = None
        self._staging = _Staging(columns, device) if device.type == "cuda" else None
        self._used: torch.cuda.Event | None = None

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
        with ThreadPoolExecutor(_readers(self.columns), "sail-read") as readers:
            reads = [readers.submit(self._read_chunk, slot, chunk) for slot, chunk in jobs]
            for slot, chunk in jobs:
                self._hash_captions(slot, chunk)
            for read in reads:
                read.result()
        self._chunks = window.chunks

    def gather(
        self,
        positions: Int64[np.ndarray, "batch"],
        fields: Int64[np.ndarray, "batch fields"],
        image: Float16[Tensor, "batch image_dim"],
        text: Float16[Tensor, "batch fields text_dim"],
    ) -> None:
        """Copy rows, and the given caption fields of each, into the memory of a batch."""
        captions = fields * self._text.shape[1] + positions[:, None]
        _take(self._image, positions, image)
        _take(self._text.flatten(0, 1), captions.reshape(-1), text.flatten(0, 1))

    def caption_ids(
        self, positions: Int64[np.ndarray, "batch"], fields: Int64[np.ndarray, "batch fields"]
    ) -> Int64[np.ndarray, "batch fields"] | None:
        """Return the caption ids of rows, None where the pool has none."""
        return None if self._caption_ids is None else self._caption_ids[positions[:, None], fields]

    def mark_used(self) -> None:
        """Say that nothing more will be gathered from the chunks that are here."""
        if self.device.type == "cuda":
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used.record()

    def _take_memory(self, slots: int) -> None:
        columns, device = self.columns, self.device
        rows, fields = slots * columns.image.rows_per_chunk, len(columns.text)
        self._slots = slots
        self._image = self._text = torch.empty(0)  # what there was is given back first
        self._image = torch.empty(rows, columns.image.dim, dtype=torch.float16, device=device)
        self._text = torch.empty(
            fields, rows, columns.text[0].dim, dtype=torch.float16, device=device
        )
        ids = np.empty((rows, fields), dtype=np.int64)
        self._caption_ids = ids if self._with_caption_ids else None

    def _read_chunk(self, slot: int, chunk: int) -> None:
        size = self.columns.image.rows_per_chunk
        part = slice(slot * size, (slot + 1) * size)
        self._read(self.columns.image, chunk, self._image[part])
        for field, column in enumerate(self.columns.text):
            self._read(column, chunk, self._text[field, part])

    def _read(self, column: Column, chunk: int, target: Float16[Tensor, "rows dim"]) -> None:
        if self._staging is None:
            column.read_into(chunk, target.numpy())
        else:
            self._staging.read(column, chunk, target)

    def _hash_captions(self, slot: int, chunk: int) -> None:
        if self._caption_ids is None:
            return
        store, size = self.columns.store, self.columns.image.rows_per_chunk
        start, stop = chunk * size, min((chunk + 1) * size, store.rows)
        for field, name in enumerate(self.columns.fields):
            hashes = key_hashes(store.captions(name, start, stop), stop - start)
            rows = self._caption_ids[slot * size : slot * size + stop - start]
            rows[:, field] = hashes.view(np.int64)


def _readers(columns: Columns) -> int:
    return REMOTE_READERS if columns.image.is_remote else READERS


def _take(
    features: Float16[Tensor, "rows dim"],
    rows: Int64[np.ndarray, "batch"],
    out: Float16[Tensor, "batch dim"],
) -> None:
    if features.device.type == "cpu":  # with `clip`, which never applies, numpy copies rows whole
        np.take(features.numpy(), rows, axis=0, out=out.numpy(), mode="clip")
    else:
        torch.index_select(features, 0, torch.from_numpy(rows).to(features.device), out=out)


class _Staging:
    """Pinned buffers of one chunk each, and the stream on which they are copied to a GPU."""

    def __init__(self, columns: Columns, device: torch.device) -> None:
        dim = max(columns.image.dim, columns.text[0].dim)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(_readers(columns)):
            elements = columns.image.rows_per_chunk * dim
            self._free.put(torch.empty(elements, dtype=torch.float16, pin_memory=True))

    def read(self, column: Column, chunk: int, target: Float16[Tensor, "rows dim"]) -> None:
        buffer = self._free.get()
        try:
            pinned = buffer[: target.numel()].view(target.shape)
            column.read_into(chunk, pinned.numpy())
            with torch.cuda.stream(self._stream):
                target.copy_(pinned, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
            copied.synchronize()
        finally:
            self._free.put(buffer)
