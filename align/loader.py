"""Shuffled batches of features from stores that may be far larger than memory.

Windows of random chunks (see `align.order`) are read straight into reused buffers, one while the
batches of the other are used; no row is touched by Python. Stores that fit are read once. See
docs/loader.md.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from align.cache import ChunkCache
from align.chunks import ChunkReader
from align.order import Order
from align.pool import Pool
from align.stream import Part, Source, Stream, joined
from align.tiers import MIB, Needs, plan_memory, shares
from align.window import OrderedWindow
from features.errors import TrainingError

__all__ = ["MIB", "Batch", "Loader", "LoaderOptions", "Source"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made."""

    batch_size: int
    """Images per batch, those of all processes together."""
    memory_bytes: int
    """For what grows with the windows and the batch, on the devices of all processes together."""
    host_memory_bytes: int = 0
    """For all rows on the host, where a GPU has not room for them; of all processes together."""
    seed: int = 0
    """Of the order and of the drawn captions."""
    captions_per_image: int | None = None
    """Captions drawn per image and step; all if not given."""
    with_caption_ids: bool = False
    """Hand out a hash of every caption."""
    verify: bool = True
    """Check the crc32c of every chunk the first time that it is read."""
    cache: Path | None = None
    """Folder for chunks of remote stores."""
    cache_bytes: int = 0
    """The most that all processes together keep there."""
    device: torch.device = CPU
    """Where the windows and the batches lie."""
    rank: int = 0
    """Number of this process among those that train together."""
    ranks: int = 1
    """Processes that train together: each takes its share of every batch, in order of the ranks.
    The batches are the same for any number of them."""


@dataclass(frozen=True)
class Batch:
    """What this process has of one step; the next batch overwrites the memory of the features."""

    rows: Int64[np.ndarray, "batch"]
    """Rows of the store; of several, as if they stood one behind the other."""
    image: Float16[Tensor, "batch image_dim"]
    text: Float16[Tensor, "batch fields text_dim"]
    weights: Float[Tensor, "batch fields"]
    """Weight of each caption in the loss; 0 where there is none to use."""
    caption_ids: Int64[Tensor, "batch fields"] | None
    """Equal where the captions are the same string."""


class Loader:
    """A stream of batches that can begin at any step."""

    def __init__(self, sources: Sequence[Source], options: LoaderOptions) -> None:
        """Take the memory that all batches will need.

        Args:
            sources: What is read; each batch has rows of all of them, in proportion to the weights.
            options: How.

        Raises:
            TrainingError: The memory does not hold two chunks and a batch, there are fewer rows
                than a batch has, a batch cannot be shared out evenly, or the sources do not go
                together.
        """
        if options.batch_size % options.ranks:
            raise TrainingError(
                f"align.batch_size = {options.batch_size} cannot be shared out evenly among "
                f"{options.ranks} processes. A multiple of their number was expected. Correct "
                f"align.batch_size, or start another number of processes."
            )
        self.options = options
        captions = _captions(sources, options.captions_per_image)
        parts = shares([source.weight for source in sources], options.batch_size)
        self.steps_per_epoch = _rows(sources) // options.batch_size
        """Whole batches that one pass over the rows gives."""
        for source, share in zip(sources, parts, strict=True):
            _check_share(source, share, options.batch_size)
        needs = [
            Needs(source.columns, share, captions, options.with_caption_ids)
            for source, share in zip(sources, parts, strict=True)
        ]
        has_host = options.device.type == "cuda"
        plan = plan_memory(
            needs,
            device_bytes=options.memory_bytes,
            host_bytes=options.host_memory_bytes if has_host else 0,
            device=str(options.device),
        )
        self.tier = plan.tier
        self._readers = plan.readers
        self._cache: ChunkCache | None = None
        if options.cache is not None:
            processes = options.ranks
            self._cache = ChunkCache(options.cache, options.cache_bytes, processes=processes)
        self.streams = [
            self._stream(source, share, places, chunks=chunks, captions=captions)
            for source, share, places, chunks in zip(
                sources, parts, _places(parts, options), plan.chunks, strict=True
            )
        ]
        size, first = options.batch_size // options.ranks, sources[0].columns
        self._image, self._text = (
            [
                torch.empty(size, *shape, dtype=torch.float16, device=options.device)
                for _ in range(2 if plan.tier == "host" else 1)
            ]
            for shape in ((first.image.dim,), (captions, first.text[0].dim))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the windows and of the batch."""
        memories = {id(each): each for stream in self.streams for each in stream.memories}.values()
        batches = [*self._image, *self._text]
        return sum(each.nbytes for each in memories) + sum(each.nbytes for each in batches)

    def batches(self, first_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """Yield the batches of some steps, epoch after epoch.

        Only what these batches need is read. Close the generator to end its threads.

        Raises:
            StoreCorruptError: A chunk is not what was written.
        """
        batches = self._batches(first_step, stop_step)
        with closing(batches):
            yield from _one_ahead(batches) if self.tier == "host" else batches

    def keys(self, step: int, count: int) -> list[str]:
        """Return the keys of the first rows of a step, without reading any features."""
        found: list[str] = []
        for stream in self.streams:
            store = stream.source.columns.store
            rows = stream.order.rows(step)[: count - len(found)].tolist()
            found += [str(store.keys(row, row + 1)[0]) for row in rows]
        return found

    def _batches(self, first_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """Gather batch after batch, into as many memories in turn as there are."""
        device = self.options.device
        turns = cycle(zip(self._image, self._text, strict=True))
        with ExitStack() as stack:
            streams = [
                stack.enter_context(closing(each)) for each in self._parts(first_step, stop_step)
            ]
            for _ in range(first_step, stop_step):
                part = joined([next(each) for each in streams])
                image, text = next(turns)
                if len(self.streams) == 1:
                    image, text = part.features  # it may be a view of a window
                ids = part.caption_ids
                yield Batch(
                    rows=part.rows,
                    image=image,
                    text=text,
                    weights=torch.from_numpy(part.weights).to(device),
                    caption_ids=None if ids is None else torch.from_numpy(ids).to(device),
                )

    def _parts(self, first_step: int, stop_step: int) -> list[Generator[Part, None, None]]:
        """Begin the streams, each with its own places of the batch to fill."""
        begun, first_row, start = [], 0, 0
        for stream in self.streams:
            stop = start + len(stream.order.places)
            if start < stop:
                batches = [
                    (image[start:stop], text[start:stop])
                    for image, text in zip(self._image, self._text, strict=True)
                ]
                parts = stream.parts(
                    first_step,
                    stop_step,
                    batches,
                    first_row=first_row,
                    may_view=len(self.streams) == 1,
                )
                begun.append(parts)
            first_row += stream.source.columns.store.rows
            start = stop
        return begun

    def _stream(
        self, source: Source, share: int, places: range, *, chunks: int, captions: int
    ) -> Stream:
        options, columns = self.options, source.columns
        order = Order(
            source.rows,
            rows_per_chunk=columns.image.rows_per_chunk,
            chunks_per_window=chunks,
            batch_size=share,
            seed=options.seed,
            places=places,
        )
        memory = CPU if self.tier == "host" else options.device
        reader = ChunkReader(
            columns,
            verify=options.verify,
            memory=memory,
            threads=self._readers,
            cache=self._cache,
        )
        return Stream(
            source,
            order,
            self._memories(order, reader, captions, is_whole=chunks == columns.image.num_chunks),
            captions,
        )

    def _memories(
        self, order: Order, reader: ChunkReader, captions: int, *, is_whole: bool
    ) -> Sequence[Pool | OrderedWindow]:
        places, with_ids = len(order.places), self.options.with_caption_ids
        if not places:
            return []
        if is_whole:
            device, chunks = self.options.device, next(order.windows(0, 1)).chunks
            return 2 * [Pool(reader, len(chunks), with_caption_ids=with_ids, device=device)]
        rows = order.chunks_per_window * order.rows_per_chunk
        rows = min(rows, rows * places // order.batch_size + places)
        return [OrderedWindow(reader, rows, captions, with_caption_ids=with_ids) for _ in range(2)]


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches that a thread makes while the one before is used."""
    with ThreadPoolExecutor(1, "sail-batch") as background:
        coming = background.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = background.submit(next, batches, None)
            yield batch


def _places(parts: Sequence[int], options: LoaderOptions) -> Iterator[range]:
    """Yield, for each source, which of its places in a batch this process takes."""
    size = options.batch_size // options.ranks
    first = options.rank * size
    for share in parts:
        yield range(min(max(first, 0), share), max(min(first + size, share), 0))
        first -= share


def _captions(sources: Sequence[Source], captions_per_image: int | None) -> int:
    """Return how many captions each image of a batch has; the same for all sources."""
    counts = {len(source.columns.text) for source in sources}
    drawn = {min(captions_per_image or count, count) for count in counts}
    if len(drawn) > 1:
        raise TrainingError(
            f"The stores of align.mix give {sorted(drawn)} captions per image. The same number was "
            f"expected from each. Set align.captions_per_image, or name fields that all of them "
            f"have in align.fields."
        )
    return drawn.pop()


def _rows(sources: Sequence[Source]) -> int:
    return sum(int(source.rows.sum()) for source in sources)


def _check_share(source: Source, share: int, batch_size: int) -> None:
    rows, path = int(source.rows.sum()), source.columns.store.path
    if share == 0:
        raise TrainingError(
            f"The weight of {path} in align.mix gives it no row of a batch of {batch_size}. At "
            f"least one was expected. Raise its weight or align.batch_size."
        )
    if share > rows:
        part = "" if share == batch_size else f", of which {share} come from that store"
        raise TrainingError(
            f"align.batch_size = {batch_size}{part} is more than the {rows} rows of {path} to "
            f"train on. At least one whole batch was expected. Lower align.batch_size."
        )
