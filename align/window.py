"""Memory for one window, whose rows lie in the order of their use: a batch is a part of it."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int64
from torch import Tensor

from align.chunks import ChunkReader, caption_hashes
from align.memory import FeaturesInMemory
from align.order import Window

Features = tuple[Float16[Tensor, "rows image_dim"], Float16[Tensor, "rows captions text_dim"]]


class OrderedWindow(FeaturesInMemory):
    """The rows of a window and the captions drawn for them, each at the place of its use.

    The system puts the rows of a chunk straight to their places (`features.scattered`). Where the
    crc32c is to be looked at first, or there is no such call, a chunk is read into a small buffer,
    which stays in the processor's cache, and its rows go on from there: 1.2 times as long. Reading
    whole chunks to memory and gathering batches from them took 1.5 times as long as that.
    """

    def __init__(
        self, reader: ChunkReader, rows: int, captions: int, *, with_caption_ids: bool
    ) -> None:
        """Take memory.

        Args:
            reader: Reads the chunks, and says where the memory is.
            rows: The most that a window has.
            captions: Drawn for each row.
            with_caption_ids: Whether the captions are hashed too.
        """
        self._captions = captions
        # The last row of each is for what is read and not used.
        super().__init__(
            reader,
            rows + 1,
            rows * captions + 1,
            with_caption_ids=with_caption_ids,
            device=reader.memory,
        )
        self._used: torch.cuda.Event | None = None

    def fill(
        self,
        window: Window,
        fields: Int64[np.ndarray, "rows captions"] | None,
        readers: ThreadPoolExecutor,
    ) -> list[Future[None]]:
        """Begin to read the chunks of a window, and return what is to be waited for.

        Args:
            window: Which, and the rows in the order of their use.
            fields: The caption fields drawn for each row; not given, all are used in order.
            readers: The threads that read; a result may be a StoreCorruptError.
        """
        if self._used is not None:
            self._used.synchronize()  # batches may still be read from here
        if fields is None:
            every = np.arange(len(self.columns.text))
            fields = np.broadcast_to(every, (len(window.positions), len(every)))
        order = np.argsort(window.positions, kind="stable")  # by chunk, and by row in the chunk
        starts = np.arange(len(window.chunks) + 1) * self.columns.image.rows_per_chunk
        bounds = np.searchsorted(window.positions[order], starts)
        reads = []
        for slot, chunk in enumerate(window.chunks.tolist()):
            members = order[bounds[slot] : bounds[slot + 1]]
            rows = window.positions[members] - starts[slot]
            reads.append(readers.submit(self._read_images, chunk, rows, members))
            for field in range(len(self.columns.text)):
                job = (field, chunk, rows, members, fields[members] == field)
                reads.append(readers.submit(self._read_captions, *job))
        return reads

    def view(self, part: slice) -> Features | None:
        """Return a batch as it lies here, None if it must be copied."""
        if self._image.scale is not None or self._text.scale is not None:
            return None
        return self._image.values[part], self._caption_rows(self._text.values, part)

    def copy(
        self,
        part: slice,
        positions: Int64[np.ndarray, "batch"],  # noqa: ARG002
        fields: Int64[np.ndarray, "batch captions"],  # noqa: ARG002
        image: Float16[Tensor, "batch image_dim"],
        text: Float16[Tensor, "batch captions text_dim"],
    ) -> None:
        """Copy a part of the window into the memory of a batch."""
        self._image.copy(part, image)
        self._text.copy(self._of_captions(part), text.flatten(0, 1))

    def caption_ids(
        self,
        part: slice,
        positions: Int64[np.ndarray, "batch"],  # noqa: ARG002
        fields: Int64[np.ndarray, "batch captions"],  # noqa: ARG002
    ) -> Int64[np.ndarray, "batch captions"] | None:
        """Return the caption ids of a part of the window, None where there are none."""
        if self._caption_ids is None:
            return None
        return self._caption_ids[self._of_captions(part)].reshape(-1, self._captions).copy()

    def mark_used(self) -> None:
        """Say that nothing more will be read from the rows that are here."""
        if self._reader.memory.type == "cuda":
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used.record()

    def _read_images(
        self, chunk: int, rows: Int64[np.ndarray, "used"], places: Int64[np.ndarray, "used"]
    ) -> None:
        """Read the images of a chunk: of its rows, those that are used go to their places."""
        targets = np.full(self.columns.image.rows_per_chunk, len(self._image.values) - 1)
        targets[rows] = places
        self._reader.scatter(self.columns.image, chunk, self._image, targets)

    def _read_captions(
        self,
        field: int,
        chunk: int,
        rows: Int64[np.ndarray, "used"],
        places: Int64[np.ndarray, "used"],
        drawn: Bool[np.ndarray, "used captions"],
    ) -> None:
        """Read one caption field of a chunk, if it was drawn for any of the rows that are used."""
        which, caption = np.nonzero(drawn)
        if not len(which):
            return
        targets = np.full(self.columns.image.rows_per_chunk, len(self._text.values) - 1)
        targets[rows[which]] = places[which] * self._captions + caption
        self._reader.scatter(self.columns.text[field], chunk, self._text, targets)
        if self._caption_ids is not None:
            hashes = caption_hashes(self.columns, field, chunk)
            self._caption_ids[targets[: len(hashes)]] = hashes

    def _of_captions(self, part: slice) -> slice:
        return slice(part.start * self._captions, part.stop * self._captions)

    def _caption_rows(self, values: Tensor, part: slice) -> Tensor:
        return values[self._of_captions(part)].view(-1, self._captions, values.shape[1])
