"""Rows of features in memory, as they are in the store, and how a batch is made of them."""

import numpy as np
import torch
from jaxtyping import Float16, Int64
from torch import Tensor


class RowsInMemory:
    """Rows on the host or on a GPU; int8 features have the factor of their row beside them.

    Where the memory is that of the host and the batch is on a GPU, rows are gathered into pinned
    memory and copied; int8 features are multiplied by the factors of their rows on the device.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: np.dtype, memory: torch.device, device: torch.device
    ) -> None:
        """Take memory.

        Args:
            shape: Rows, and their length.
            dtype: As in the store: float16 or int8.
            memory: Where they lie.
            device: Where the batches lie.
        """
        self._memory = memory
        self._device = device
        self._pin = memory.type == "cpu" and device.type == "cuda"
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
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self._memory)
        if self.scale is None and self._memory == self._device:
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
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def copy(self, part: slice, out: Float16[Tensor, "batch dim"]) -> None:
        """Copy rows that stand one behind the other into the memory of a batch."""
        _restore(self.values[part], None if self.scale is None else self.scale[part], out)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._memory, pin_memory=self._pin)


def _restore(values: Tensor, scale: Tensor | None, out: Float16[Tensor, "batch dim"]) -> None:
    if scale is None:
        out.copy_(values, non_blocking=True)
    else:
        values = values.to(out.device, non_blocking=True)
        torch.mul(values, scale.to(out.device)[:, None], out=out)
