"""Some rows of a store, in any order."""

import hashlib

import numpy as np
from jaxtyping import Int64

from pipeline.formats.rows import Block, Layout, selected
from pipeline.formats.store import StoreRows
from pipeline.interrupt import Stopped, StopRequest


class ChosenRows:
    """Rows of a store by their numbers; of every chunk that has some of a block, one read."""

    def __init__(
        self,
        rows: StoreRows,
        numbers: Int64[np.ndarray, "chosen"],
        layout: Layout,
        stop: StopRequest,
    ) -> None:
        self.layout = layout
        self._rows, self._numbers, self._stop = rows, numbers, stop

    @property
    def stamp(self) -> str:
        """Of the store, and which rows."""
        return f"{self._rows.stamp} {hashlib.sha256(self._numbers.tobytes()).hexdigest()}"

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`.

        Raises:
            StoreCorruptError: A chunk of theirs is damaged or missing.
            Stopped: A signal came: they may be spread over many chunks.
        """
        numbers = self._numbers[start:stop]
        size = self._rows.layout.rows_per_chunk
        order = np.argsort(numbers, kind="stable")
        ends = np.flatnonzero(np.diff(numbers[order] // size)) + 1
        block: Block = {}
        for places in np.split(order, ends):
            if self._stop():
                raise Stopped
            first = int(numbers[places[0]]) // size * size
            chunk = self._rows.block(first, min(first + size, self._rows.layout.rows))
            for name, values in selected(chunk, numbers[places] - first).items():
                if name not in block:
                    block[name] = np.empty((len(numbers), *values.shape[1:]), values.dtype)
                block[name][places] = values
        return block
