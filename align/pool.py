"""Memory for all rows that a process uses: read once, and gathered from in every epoch's order."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from align.chunks import ChunkReader, caption_hashes
from align.order import Window
from align.rows import RowsInMemory


class Pool:
    """The features, and on request the caption ids, of all chunks that are used, as on disk."""

    def __init__(
        self, reader: ChunkReader, chunks: int, *, with_caption_ids: bool, device: torch.device
    ) -> None:
        """Take memory.

        Args:
            reader: Reads the chunks, and says where they lie.
            chunks: How many.
            with_caption_ids: Whether the captions are hashed too.
            device: Where the batches lie.
        """
        self.columns = reader.columns
        self.threads = reader.threads
        self._reader = reader
        image, text = self.columns.image, self.columns.text[0]
        self._rows = chunks * image.rows_per_chunk
        fields = len(self.columns.text)
        memory, texts = reader.memory, fields * self._rows
        self._image = RowsInMemory((self._rows, image.dim), image.dtype, memory, device)
        self._text = RowsInMemory((texts, text.dim), text.dtype, memory, device)
        ids = np.empty((self._rows, fields), dtype=np.int64)
        self._caption_ids = ids if with_caption_ids else None
        self._reads: list[Future[None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks."""
        ids = 0 if self._caption_ids is None else self._caption_ids.nbytes
        return self._image.nbytes + self._text.nbytes + ids

    def fill(
        self,
        window: Window,
        fields: Int64[np.ndarray, "rows captions"] | None,  # noqa: ARG002
        readers: ThreadPoolExecutor,
    ) -> list[Future[None]]:
        """Begin to read the chunks of the only window, unless that was done before.

        Args:
            window: The same chunks every time.
            fields: Of no matter: all are read.
            readers: The threads that read; a result may be a StoreCorruptError.

        Returns:
            What is to be waited for.
        """
        if not self._reads or any(map(_has_failed, self._reads)):
            self._reads = [
                readers.submit(self._read_chunk, slot, chunk)
                for slot, chunk in enumerate(window.chunks.tolist())
            ]
        return self._reads

    def view(self, part: slice) -> None:
        """Return None: no batch lies here as it is used."""

    def copy(
        self,
        part: slice,  # noqa: ARG002
        positions: Int64[np.ndarray, "batch"],
        fields: Int64[np.ndarray, "batch captions"],
        image: Float16[Tensor, "batch image_dim"],
        text: Float16[Tensor, "batch captions text_dim"],
    ) -> None:
        """Copy rows, and the given caption fields of each, into the memory of a batch."""
        captions = fields * self._rows + positions[:, None]
        self._image.gather(positions, image)
        self._text.gather(captions.reshape(-1), text.flatten(0, 1))

    def caption_ids(
        self,
        part: slice,  # noqa: ARG002
        positions: Int64[np.ndarray, "batch"],
        fields: Int64[np.ndarray, "batch captions"],
    ) -> Int64[np.ndarray, "batch captions"] | None:
        """Return the caption ids of rows, None where the pool has none."""
        return None if self._caption_ids is None else self._caption_ids[positions[:, None], fields]

    def mark_used(self) -> None:
        """Do nothing: what is here stays."""

    def _read_chunk(self, slot: int, chunk: int) -> None:
        size = self.columns.image.rows_per_chunk
        self._reader.read(self.columns.image, chunk, self._image, slot * size)
        for field, column in enumerate(self.columns.text):
            self._reader.read(column, chunk, self._text, field * self._rows + slot * size)
        if self._caption_ids is not None:
            for field in range(len(self.columns.text)):
                hashes = caption_hashes(self.columns, field, chunk)
                self._caption_ids[slot * size : slot * size + len(hashes), field] = hashes


def _has_failed(read: Future[None]) -> bool:
    """Whether a read was cancelled, as when its stream was closed, or could not be made."""
    return read.cancelled() or (read.done() and read.exception() is not None)
