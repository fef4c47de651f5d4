"""What all memory for the rows of a store has, in whatever order they lie there."""

import numpy as np
import torch

from align.chunks import ChunkReader
from align.rows import RowsInMemory


class FeaturesInMemory:
    """The features of images and captions, and on request a hash of each caption."""

    def __init__(
        self,
        reader: ChunkReader,
        images: int,
        captions: int,
        *,
        with_caption_ids: bool,
        device: torch.device,
    ) -> None:
        """Take memory.

        Args:
            reader: Reads the chunks, and says where they lie.
            images: How many.
            captions: How many.
            with_caption_ids: Whether the captions are hashed too.
            device: Where the batches lie.
        """
        self.columns = reader.columns
        self.threads = reader.threads
        self._reader = reader
        image, text = self.columns.image, self.columns.text[0]
        self._image = RowsInMemory((images, image.dim), image.dtype, reader.memory, device)
        self._text = RowsInMemory((captions, text.dim), text.dtype, reader.memory, device)
        self._caption_ids = np.empty(captions, dtype=np.int64) if with_caption_ids else None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        ids = 0 if self._caption_ids is None else self._caption_ids.nbytes
        return self._image.nbytes + self._text.nbytes + ids
