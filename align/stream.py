"""The rows of one store in the order of their use: its share of every batch."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

from align.order import Order, Window
from align.pool import Pool
from align.selection import Columns

Memory = tuple[Float16[Tensor, "places image_dim"], Float16[Tensor, "places captions text_dim"]]
CAPTIONS = 2  # stream of random numbers; those of align.order are 0 and 1


@dataclass(frozen=True)
class Source:
    """Rows of a store that are trained on."""

    columns: Columns
    rows: Bool[np.ndarray, "rows"]
    """The rows to go through; each has an image, and a caption at least."""
    text_ok: Bool[np.ndarray, "rows fields"]
    """Captions that can be used."""
    field_weights: tuple[float, ...] | None = None
    """Weight of each caption field in the loss; 1 if not given."""
    weight: float = 1.0
    """How many of a batch's rows come from here, in proportion to the other sources."""


@dataclass(frozen=True)
class Part:
    """What is known of the rows of a batch that come from one store, beside their features."""

    rows: Int64[np.ndarray, "part"]
    weights: Float[np.ndarray, "part fields"]
    caption_ids: Int64[np.ndarray, "part fields"] | None


class Stream:
    """What one store gives to each batch; it can begin at any step."""

    def __init__(self, source: Source, order: Order, pools: list[Pool], *, captions: int) -> None:
        """Take what was planned.

        Args:
            source: The rows.
            order: Their order, in batches of this store's share.
            pools: Memory for windows: one if all rows are in one window, or else two.
            captions: Drawn per image and step.
        """
        self.source = source
        self.order = order
        self.pools = pools
        self.captions = captions
        fields = source.field_weights or (1.0,) * len(source.columns.text)
        self._field_weights = np.array(fields, dtype=np.float32)

    def parts(
        self,
        first_step: int,
        stop_step: int,
        memories: Sequence[Memory],
        *,
        first_row: int = 0,
    ) -> Generator[Part, None, None]:
        """Yield this store's part of each step.

        Args:
            first_step: Of those that are yielded.
            stop_step: The one after them.
            memories: Where the features of a step go, image and text; taken in turn.
            first_row: What the first row of the store is called.
        """
        step, parts, done = first_step, list[Part](), 0
        places, turns = len(self.order.places), cycle(memories)
        image, text = next(turns)
        for window, pool in self._loaded(self.order.windows(first_step, stop_step)):
            start = 0
            while start < len(window.positions):
                positions = window.positions[start : start + places - done]
                rows = self.order.store_rows(window, positions)
                ok = self.source.text_ok[rows]
                fields = self._draw(ok, step, done)
                into = slice(done, done + len(positions))
                pool.gather(positions, fields, image[into], text[into])
                weights = self._field_weights[fields] * np.take_along_axis(ok, fields, axis=1)
                parts.append(Part(first_row + rows, weights, pool.caption_ids(positions, fields)))
                start, done = start + len(positions), done + len(positions)
                if done == places:
                    yield joined(parts)
                    step, parts, done = step + 1, [], 0
                    image, text = next(turns)

    def _loaded(self, windows: Iterator[Window]) -> Iterator[tuple[Window, Pool]]:
        """Yield windows in memory; the next is loaded meanwhile, into the pool that is free."""

        def load(pool: Pool) -> tuple[Window, Pool] | None:
            window = next(windows, None)
            if window is None:
                return None
            pool.fill(window)
            return window, pool

        pools = cycle(self.pools)
        with ThreadPoolExecutor(1, "sail-window") as background:
            coming = background.submit(load, next(pools))
            while (loaded := coming.result()) is not None:
                coming = background.submit(load, next(pools))
                yield loaded
                loaded[1].mark_used()

    def _draw(
        self, ok: Bool[np.ndarray, "part all_fields"], step: int, done: int
    ) -> Int64[np.ndarray, "part fields"]:
        """Choose caption fields for each row, those that can be used before the others."""
        fields = ok.shape[1]
        if self.captions == fields:
            return np.broadcast_to(np.arange(fields), ok.shape)
        order = self.order
        generator = np.random.Generator(np.random.PCG64([order.seed, CAPTIONS, step]))
        ranks = generator.random((order.batch_size, fields), dtype=np.float32)
        first = order.places.start + done
        ranks = ranks[first : first + len(ok)] + ~ok
        chosen = np.argpartition(ranks, self.captions - 1, axis=1)[:, : self.captions]
        return np.sort(chosen, axis=1)


def joined(parts: list[Part]) -> Part:
    """Return parts of a batch as one."""
    ids = [part.caption_ids for part in parts if part.caption_ids is not None]
    return Part(
        rows=np.concatenate([part.rows for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        caption_ids=np.concatenate(ids) if ids else None,
    )
