"""What goes from one form to another: a layout, and the rows, a block at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from pipeline.interrupt import StopRequest

Block = dict[str, np.ndarray]
"""Some rows of every array, by the names that the arrays have in a store."""
ROWS_PER_CHUNK = 4096
STRINGS = np.dtypes.StringDType()


@dataclass(frozen=True)
class Layout:
    """What a store says of itself, but for its rows."""

    rows: int
    names: tuple[str, ...]
    """Arrays of no encoder: `key`, `caption/<field>`, `label`, `group`."""
    columns: Mapping[str, int]
    """Length of the features by name: `image/<encoder>`, `text/<encoder>/<field>`."""
    fingerprints: Mapping[str, Mapping[str, Any]]
    """By `image/<encoder>` and `text/<encoder>`."""
    source: Mapping[str, Any]
    rows_per_chunk: int = ROWS_PER_CHUNK
    class_names: tuple[str, ...] | None = None
    scaled: tuple[str, ...] = ()
    """Columns of 8 bits, whose blocks have `<column>/scale` too."""
    keys_sha256: str | None = None
    """What the keys must have, where that is known."""

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of the arrays of a block, in the order in which they are to be written."""
        names = list(self.names)
        for column in self.columns:
            scale = [f"{column}/scale"] if column in self.scaled else []
            names += [*scale, f"{column}/features", f"{column}/status"]
        return tuple(names)

    def with_rows_per_chunk(self, rows_per_chunk: int) -> "Layout":
        """Return the layout of a store that is cut in other chunks."""
        return replace(self, rows_per_chunk=rows_per_chunk)

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Layout":
        """Return the layout that `to_json` wrote.

        Raises:
            ValueError, TypeError: The text is something else.
        """
        found = json.loads(text)
        for name in ("names", "scaled", "class_names"):
            found[name] = None if found[name] is None else tuple(found[name])
        return cls(**found)


class Rows(Protocol):
    """Rows that a store can be made of."""

    @property
    def layout(self) -> Layout:
        """What the store will say of itself."""

    @property
    def stamp(self) -> str:
        """What changes when the rows do."""

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`. Blocks are asked for in order."""


def chunks_of(
    rows: Rows, size: int, stop: StopRequest, chunks: range, rows_at_once: int = 1
) -> Iterator[Block]:
    """Yield rows as chunks of a store to be, the last smaller.

    Where more rows are read at once than a chunk has, several chunks are made of one read.

    Args:
        rows: Whose.
        size: Rows of a chunk that is made.
        stop: Asked before every read.
        chunks: Which, in order.
        rows_at_once: How many rows are read at once, rounded up to whole chunks.

    Raises:
        Stopped: A signal came.
    """
    at_once = (
        max(1, rows_at_once // size) if rows_at_once else -(-rows.layout.rows_per_chunk // size)
    )
    for first in chunks[::at_once]:
        stop.check()
        last = min(first + at_once, chunks.stop)
        block = rows.block(first * size, min(last * size, rows.layout.rows))
        for start in range(0, num_rows(block), size):
            yield selected(block, slice(start, start + size))


def num_rows(block: Block) -> int:
    """Return the rows of a block."""
    return len(next(iter(block.values())))


def selected(block: Block, rows: Any) -> Block:
    """Return some rows of a block: a slice, a mask or numbers."""
    return {name: values[rows] for name, values in block.items()}


def joined(blocks: Sequence[Block]) -> Block:
    """Return the rows of blocks of the same arrays behind each other."""
    if len(blocks) == 1:
        return blocks[0]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
