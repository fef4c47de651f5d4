"""Reads whole chunks of a store into memory that is used again, on the host or on a GPU."""

from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from align.selection import Columns
from features.column import Column

READERS = 4  # threads that read chunks: enough to keep a local disk busy
REMOTE_READERS = 16  # under a URL they mostly wait


class ChunkReader:
    """What the windows of one store are read by.

    Chunks come to a GPU through pinned memory on a stream of their own, so that training goes on
    meanwhile.
    """

    def __init__(self, columns: Columns, *, verify: bool, memory: torch.device) -> None:
        """Take the pinned memory, if chunks go to a GPU.

        Args:
            columns: What is read.
            verify: Whether to check the crc32c of each chunk the first time that it is read.
            memory: Where the chunks go.
        """
        self.columns = columns
        self._checked = {
            column.name: np.full(column.num_chunks, not verify)
            for column in (columns.image, *columns.text)
        }
        self.threads = REMOTE_READERS if columns.image.is_remote else READERS
        """How many may read at once."""
        self._staging = _Staging(columns, memory, self.threads) if memory.type == "cuda" else None

    def read(
        self,
        column: Column,
        chunk: int,
        values: Shaped[Tensor, "rows dim"],
        scale: Float32[Tensor, "rows"] | None,
    ) -> None:
        """Fill memory with a chunk as it is on disk, and with the factors of int8 features.

        Raises:
            StoreCorruptError: The chunk is not what was written.
        """
        checked = self._checked[column.name]
        if self._staging is None:
            column.read_into(chunk, values.numpy(), verify=not checked[chunk])
            if scale is not None:
                column.read_scale_into(chunk, scale.numpy())
        else:
            self._staging.read(column, chunk, (values, scale), verify=not checked[chunk])
        checked[chunk] = True


class _Staging:
    """Pinned buffers of one chunk each, and the stream on which they are copied to a GPU."""

    def __init__(self, columns: Columns, device: torch.device, buffers: int) -> None:
        size = max(
            column.rows_per_chunk * column.dim * column.dtype.itemsize
            for column in (columns.image, *columns.text)
        )
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(torch.empty(size, dtype=torch.uint8, pin_memory=True))

    def read(
        self, column: Column, chunk: int, target: tuple[Tensor, Tensor | None], *, verify: bool
    ) -> None:
        values, scale = target
        buffer = self._free.get()
        try:
            pinned = buffer[: values.nbytes].view(values.dtype).view(values.shape)
            column.read_into(chunk, pinned.numpy(), verify=verify)
            with torch.cuda.stream(self._stream):
                values.copy_(pinned, non_blocking=True)
                if scale is not None:
                    factors = np.empty(column.rows_per_chunk, dtype=np.float32)
                    column.read_scale_into(chunk, factors)
                    scale.copy_(torch.from_numpy(factors))
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
            copied.synchronize()
        finally:
            self._free.put(buffer)
