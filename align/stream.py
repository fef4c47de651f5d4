"""The rows of one store in the order of their use: its share of every batch."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from jaxtyping import Bool, Float, Int64

from align.order import Order, Window
from align.pool import Pool
from align.selection import Columns
from align.window import Features, OrderedWindow

CAPTIONS = 2  # stream of random numbers; those of align.order are 0 and 1

Loaded = tuple[Window, Pool | OrderedWindow, Int64[np.ndarray, "rows captions"] | None]


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
    features: Features
    """Of the whole share of this store, when all parts of it are together."""


class Stream:
    """What one store gives to each batch; it can begin at any step."""

    def __init__(
        self, source: Source, order: Order, memories: Sequence[Pool | OrderedWindow], captions: int
    ) -> None:
        """Take what was planned.

        Args:
            source: The rows.
            order: Their order, in batches of this store's share.
            memories: Two windows; or a pool twice, if all rows stay in memory: the order of the
                next epoch is then made during this one.
            captions: Drawn per image and step.
        """
        self.threads = memories[0].threads if memories else 1
        self.source = source
        self.order = order
        self.memories = memories
        self.captions = captions
        self._all_ok = bool(source.text_ok[source.rows].all())
        fields = source.field_weights or (1.0,) * len(source.columns.text)
        self._field_weights = np.array(fields, dtype=np.float32)

    def parts(
        self,
        first_step: int,
        stop_step: int,
        batches: Sequence[Features],
        *,
        first_row: int = 0,
        may_view: bool = False,
    ) -> Generator[Part, None, None]:
        """Yield this store's part of each step.

        Args:
            first_step: Of those that are yielded.
            stop_step: The one after them.
            batches: Memory for the features of a step; taken in turn.
            first_row: What the first row of the store is called.
            may_view: Whether the features may stay where a window has them in order.
        """
        parts, done, step = list[Part](), 0, first_step
        places, turns = len(self.order.places), cycle(batches)
        for window, memory, drawn in self._loaded(first_step, stop_step):
            start = 0
            while start < len(window.positions):
                if done == 0:
                    image, text = next(turns)
                part = slice(start, min(start + places - done, len(window.positions)))
                positions = window.positions[part]
                rows = self.order.store_rows(window, positions)
                ok = self._usable_captions(rows)
                fields = self._draw(ok, step, done) if drawn is None else drawn[part]
                is_batch = may_view and part.stop - start == places
                features = memory.view(part) if is_batch else None
                if features is None:
                    into = slice(done, done + len(positions))
                    memory.copy(part, positions, fields, image[into], text[into])
                    features = image, text
                weights = self._field_weights[fields]
                if not self._all_ok:
                    weights *= np.take_along_axis(ok, fields, axis=1)
                ids = memory.caption_ids(part, positions, fields)
                parts.append(Part(first_row + rows, weights, ids, features))
                start, done = part.stop, done + len(positions)
                if done == places:
                    yield joined(parts)
                    parts, done, step = [], 0, step + 1

    def _usable_captions(
        self, rows: Int64[np.ndarray, "part"]
    ) -> Bool[np.ndarray, "part all_fields"]:
        if self._all_ok:  # as in most stores; then no row is looked up
            return np.ones((len(rows), len(self.source.columns.text)), dtype=bool)
        usable: np.ndarray = self.source.text_ok[rows]
        return usable

    def _loaded(self, first_step: int, stop_step: int) -> Iterator[Loaded]:
        """Yield windows in memory; the next are read meanwhile, into the memory that is free.

        One thread plans the windows and the others read, so that these never wait for a plan, nor
        for the last chunk of a window.
        """
        windows = self._windows(first_step, stop_step)

        def begin(memory: Pool | OrderedWindow) -> tuple[Loaded, list[Future[None]]] | None:
            window, fields = next(windows, (None, None))
            if window is None:
                return None
            return (window, memory, fields), memory.fill(window, fields, readers)

        planner = ThreadPoolExecutor(1, "sail-window")
        readers = ThreadPoolExecutor(self.threads, "sail-read")
        try:
            coming = deque(planner.submit(begin, memory) for memory in self.memories)
            while (begun := coming.popleft().result()) is not None:
                loaded, reads = begun
                for read in reads:
                    read.result()
                yield loaded
                loaded[1].mark_used()
                coming.append(planner.submit(begin, loaded[1]))
        finally:
            planner.shutdown(cancel_futures=True)
            readers.shutdown(cancel_futures=True)

    def _windows(
        self, first_step: int, stop_step: int
    ) -> Iterator[tuple[Window, Int64[np.ndarray, "rows captions"] | None]]:
        """Yield windows, with the caption fields of all their rows if those lie in their order."""
        step, done, places = first_step, 0, len(self.order.places)
        for window in self.order.windows(first_step, stop_step):
            if isinstance(self.memories[0], Pool):
                yield window, None
                continue
            fields, start, count = [], 0, len(window.positions)
            while start < count:
                stop = min(start + places - done, count)
                rows = self.order.store_rows(window, window.positions[start:stop])
                fields.append(self._draw(self._usable_captions(rows), step, done))
                done += stop - start
                step, done, start = step + done // places, done % places, stop
            yield window, np.concatenate(fields)

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
    if len(parts) == 1:
        return parts[0]
    ids = [part.caption_ids for part in parts if part.caption_ids is not None]
    return Part(
        rows=np.concatenate([part.rows for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        caption_ids=np.concatenate(ids) if ids else None,
        features=parts[-1].features,
    )
