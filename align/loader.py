"""Shuffled batches of features from stores that may be far larger than memory.

Windows of random chunks (see `align.order`) are read straight into reused buffers, one while the
batches of the other are used; no row is touched by Python. Stores that fit are read once. See
docs/loader.md.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

from align.chunk_reader import ChunkCache, ChunkReader
from align.columns import Columns
from align.order import Order, Window
from align.windows import MIB, Features, Needs, OrderedWindow, Pool, plan_memory, shares
from features.errors import TrainingError

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
