"""Memory for all rows that a process uses: read once, and gathered from in every epoch's order."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from align.chunks import ChunkReader, caption_hashes
from align.memory import FeaturesInMemory
from align.order import Window


class Pool(FeaturesInMemory):
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
        self._rows = chunks * reader.columns.image.rows_per_chunk
        captions = len(reader.columns.text) * self._rows
        super().__init__(
            reader, self._rows, captions, with_caption_ids=with_caption_ids, device=device
        )
        self._reads: list[Future[None]] = []

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
        self._image.gather(positions, image)
        self._text.gather(self._captions(positions, fields).ravel(), text.flatten(0, 1))

    def caption_ids(
        self,
        part: slice,  # noqa: ARG002
        positions: Int64[np.ndarray, "batch"],
        fields: Int64[np.ndarray, "batch captions"],
    ) -> Int64[np.ndarray, "batch captions"] | None:
        """Return the caption ids of rows, None where the pool has none."""
        if self._caption_ids is None:
            return None
        ids: np.ndarray = self._caption_ids[self._captions(positions, fields)]
        return ids

    def mark_used(self) -> None:
        """Do nothing: what is here stays."""

    def _read_chunk(self, slot: int, chunk: int) -> None:
        size = self.columns.image.rows_per_chunk
        self._reader.read(self.columns.image, chunk, self._image, slot * size)
        for field, column in enumerate(self.columns.text):
            first = field * self._rows + slot * size
            self._reader.read(column, chunk, self._text, first)
            if self._caption_ids is not None:
                hashes = caption_hashes(self.columns, field, chunk)
                self._caption_ids[first : first + len(hashes)] = hashes

    def _captions(
        self, positions: Int64[np.ndarray, "batch"], fields: Int64[np.ndarray, "batch captions"]
    ) -> Int64[np.ndarray, "batch captions"]:
        """Return where the given caption fields of rows lie: all of a field stand together."""
        places: np.ndarray = fields * self._rows + positions[:, None]
        return places


def _has_failed(read: Future[None]) -> bool:
    """Whether a read was cancelled, as when its stream was closed, or could not be made."""
    return read.cancelled() or (read.done() and read.exception() is not None)
