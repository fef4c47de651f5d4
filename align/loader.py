"""Shuffled batches of features from a store that may be far larger than memory.

Windows of random chunks (see `align.order`) are read straight into reused buffers, one while the
batches of the other are used; no row is touched by Python. A store that fits is read once.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

from align.order import Order, Window
from align.pool import Pool
from align.selection import Columns
from features.errors import TrainingError

CAPTIONS = 2  # stream of random numbers; those of align.order are 0 and 1
MIB = 2**20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made."""

    batch_size: int
    """Images per batch, those of all processes together."""
    memory_bytes: int
    """For what grows with the windows and the batch, on the devices of all processes together."""
    seed: int = 0
    """Of the order and of the drawn captions."""
    captions_per_image: int | None = None
    """Captions drawn per image and step; all if not given."""
    field_weights: tuple[float, ...] | None = None
    """Weight of each caption field in the loss; 1 if not given."""
    with_caption_ids: bool = False
    """Hand out a hash of every caption."""
    device: torch.device = CPU
    """Where the windows and the batches lie."""
    rank: int = 0
    """Number of this process among those that train together."""
    ranks: int = 1
    """Processes that train together: each takes its share of every batch, in order of the ranks.
    The batches are the same for any number of them."""

    @property
    def places(self) -> range:
        """Places of each batch that this process takes."""
        share = self.batch_size // self.ranks
        return range(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True)
class Batch:
    """What this process has of one step; the next batch overwrites the memory of the features."""

    rows: Int64[np.ndarray, "batch"]
    """Rows of the store."""
    image: Float16[Tensor, "batch image_dim"]
    text: Float16[Tensor, "batch fields text_dim"]
    weights: Float[Tensor, "batch fields"]
    """Weight of each caption in the loss; 0 where there is none to use."""
    caption_ids: Int64[Tensor, "batch fields"] | None
    """Equal where the captions are the same string."""


class Loader:
    """A stream of batches that can begin at any step."""

    def __init__(
        self,
        columns: Columns,
        rows: Bool[np.ndarray, "rows"],
        text_ok: Bool[np.ndarray, "rows fields"],
        options: LoaderOptions,
    ) -> None:
        """Take the memory that all batches will need.

        Args:
            columns: What is read.
            rows: The rows to go through; each has an image, and a caption at least.
            text_ok: Captions that can be used.
            options: How.

        Raises:
            TrainingError: The memory does not hold two chunks and a batch, there are fewer rows
                than a batch has, or a batch cannot be shared out evenly.
        """
        if options.batch_size % options.ranks:
            raise TrainingError(
                f"align.batch_size = {options.batch_size} cannot be shared out evenly among "
                f"{options.ranks} processes. A multiple of their number was expected. Correct "
                f"align.batch_size, or start another number of processes."
            )
        self.columns = columns
        self.options = options
        self._text_ok = text_ok
        fields = len(columns.text)
        self._drawn = min(options.captions_per_image or fields, fields)
        self._field_weights = np.array(options.field_weights or (1.0,) * fields, dtype=np.float32)
        self.order = Order(
            rows,
            rows_per_chunk=columns.image.rows_per_chunk,
            chunks_per_window=self._chunks_that_fit(),
            batch_size=options.batch_size,
            seed=options.seed,
            places=options.places,
        )
        if self.order.steps_per_epoch == 0:
            raise TrainingError(
                f"align.batch_size = {options.batch_size} is more than the {int(rows.sum())} rows "
                f"of {columns.store.path} to train on. At least one whole batch was expected. "
                f"Lower align.batch_size."
            )
        self._pools = [
            Pool(
                columns,
                self._slots(),
                with_caption_ids=options.with_caption_ids,
                device=options.device,
            )
            for _ in range(1 if self.order.is_resident else 2)
        ]
        size, device = len(options.places), options.device
        self._image = torch.empty(size, columns.image.dim, dtype=torch.float16, device=device)
        self._text = torch.empty(
            size, self._drawn, columns.text[0].dim, dtype=torch.float16, device=device
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches that one pass over the rows gives."""
        return self.order.steps_per_epoch

    def batches(self, first_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """Yield the batches of some steps, epoch after epoch.

        Only what these batches need is read. Close the generator to end its threads.

        Raises:
            StoreCorruptError: A chunk is not what was written.
        """
        windows = self.order.windows(first_step, stop_step)
        step, parts = first_step, list[_Part]()
        missing = size = len(self.options.places)
        for window, pool in self._loaded(windows):
            start = 0
            while start < len(window.positions):
                positions = window.positions[start : start + missing]
                done = size - missing
                parts.append(self._gather(window, pool, positions, step=step, done=done))
                start += len(positions)
                missing -= len(positions)
                if missing == 0:
                    yield self._batch(parts)
                    step, parts, missing = step + 1, [], size

    def _loaded(self, windows: Iterator[Window]) -> Iterator[tuple[Window, Pool]]:
        """Yield windows in memory; the next is loaded meanwhile, into the pool that is free."""

        def load(pool: Pool) -> tuple[Window, Pool] | None:
            window = next(windows, None)
            if window is None:
                return None
            pool.fill(window)
            return window, pool

        pools = cycle(self._pools)
        with ThreadPoolExecutor(1, "sail-window") as background:
            coming = background.submit(load, next(pools))
            while (loaded := coming.result()) is not None:
                coming = background.submit(load, next(pools))
                yield loaded
                loaded[1].mark_used()

    def _gather(
        self,
        window: Window,
        pool: Pool,
        positions: Int64[np.ndarray, "part"],
        *,
        step: int,
        done: int,
    ) -> "_Part":
        """Copy rows of a window into the batch, behind the `done` rows that are there."""
        rows = self.order.store_rows(window, positions)
        ok = self._text_ok[rows]
        fields = self._draw(ok, step, done)
        into = slice(done, done + len(positions))
        pool.gather(positions, fields, self._image[into], self._text[into])
        weights = self._field_weights[fields] * np.take_along_axis(ok, fields, axis=1)
        return _Part(rows, weights, pool.caption_ids(positions, fields))

    def _draw(
        self, ok: Bool[np.ndarray, "part all_fields"], step: int, done: int
    ) -> Int64[np.ndarray, "part fields"]:
        """Choose caption fields for each row, those that can be used before the others."""
        fields = ok.shape[1]
        if self._drawn == fields:
            return np.broadcast_to(np.arange(fields), ok.shape)
        generator = np.random.Generator(np.random.PCG64([self.options.seed, CAPTIONS, step]))
        ranks = generator.random((self.options.batch_size, fields), dtype=np.float32)
        first = self.options.places.start + done
        ranks = ranks[first : first + len(ok)] + ~ok
        chosen = np.argpartition(ranks, self._drawn - 1, axis=1)[:, : self._drawn]
        return np.sort(chosen, axis=1)

    def _batch(self, parts: "list[_Part]") -> Batch:
        device = self.options.device
        weights = np.concatenate([part.weights for part in parts])
        ids = [part.caption_ids for part in parts if part.caption_ids is not None]
        return Batch(
            rows=np.concatenate([part.rows for part in parts]),
            image=self._image,
            text=self._text,
            weights=torch.from_numpy(weights).to(device),
            caption_ids=torch.from_numpy(np.concatenate(ids)).to(device) if ids else None,
        )

    def _slots(self) -> int:
        """Chunks of a window that this process reads; the parts of two others may touch them."""
        return min(
            self.order.chunks_per_window // self.options.ranks + 2, self.order.chunks_per_window
        )

    def _chunks_that_fit(self) -> int:
        image, text = self.columns.image, self.columns.text
        text_dim = text[0].dim
        row_bytes = 2 * (image.dim + len(text) * text_dim)
        row_bytes += 8 * len(text) * self.options.with_caption_ids
        chunk_bytes = image.rows_per_chunk * row_bytes
        batch_bytes = 2 * self.options.batch_size * (image.dim + self._drawn * text_dim)
        left = self.options.memory_bytes - batch_bytes
        if image.num_chunks * chunk_bytes <= left:
            return image.num_chunks
        if left < 2 * chunk_bytes:
            needed = -(-(batch_bytes + 2 * chunk_bytes) // MIB)
            raise TrainingError(
                f"align.memory_mb = {self.options.memory_bytes // MIB} does not hold two chunks "
                f"({chunk_bytes / MIB:,.1f} MiB each) and a batch ({batch_bytes / MIB:,.1f} MiB). "
                f"At least {needed} were expected. Raise align.memory_mb, lower align.batch_size, "
                f"or extract with fewer extract.rows_per_chunk."
            )
        return left // (2 * chunk_bytes)


@dataclass(frozen=True)
class _Part:
    """What is known of rows of a batch that come from one window, beside their features."""

    rows: Int64[np.ndarray, "part"]
    weights: Float[np.ndarray, "part fields"]
    caption_ids: Int64[np.ndarray, "part fields"] | None
