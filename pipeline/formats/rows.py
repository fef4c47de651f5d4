"""What goes from one form to another: a layout, and the rows, a block at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from pipeline.interrupt import Stopped, StopRequest

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

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`. Blocks are asked for in order."""


def encoder_of(column: str) -> str:
    """Return `image/<encoder>` or `text/<encoder>`, to which a column belongs."""
    return "/".join(column.split("/")[:2])


def blocks_of(rows: Rows, stop: StopRequest, size: int | None = None) -> Iterator[Block]:
    """Yield all rows in blocks of one size, the last smaller.

    Args:
        rows: Whose.
        stop: Asked before every block.
        size: Rows of a block; those of a chunk if not given.

    Raises:
        Stopped: A signal came.
    """
    size = size or rows.layout.rows_per_chunk
    for start in range(0, rows.layout.rows, size):
        if stop():
            raise Stopped
        yield rows.block(start, min(start + size, rows.layout.rows))


def in_chunks(blocks: Iterable[Block], size: int) -> Iterator[Block]:
    """Yield the rows of blocks of any sizes in blocks of one size, the last smaller."""
    waiting: Block = {}
    for block in blocks:
        block = _joined(waiting, block) if waiting else block
        while num_rows(block) >= size:
            yield {name: values[:size] for name, values in block.items()}
            block = {name: values[size:] for name, values in block.items()}
        waiting = block if num_rows(block) else {}
    if waiting:
        yield waiting


def num_rows(block: Block) -> int:
    """Return the rows of a block."""
    return len(next(iter(block.values())))


def selected(block: Block, rows: Any) -> Block:
    """Return some rows of a block: a slice, a mask or numbers."""
    return {name: values[rows] for name, values in block.items()}


def _joined(first: Block, second: Block) -> Block:
    return {name: np.concatenate([first[name], second[name]]) for name in second}
