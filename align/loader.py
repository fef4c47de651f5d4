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
from jaxtyping import Bool, Float16, Int64
from torch import Tensor

from align.chunk_reader import ChunkCache, ChunkReader
from align.columns import Columns
from align.order import Order, Window
from align.windows import (
    MIB,
    Needs,
    ResidentMemory,
    StepPart,
    StreamingMemory,
    WindowMemory,
    WindowPlan,
    plan_memory,
    shares,
)
from features.device.cuda import CPU, is_gpu, record, set_current, to_device, wait_for
from features.errors import TrainingError

__all__ = ["MIB", "Batch", "Loader", "LoaderOptions", "Source"]
CAPTIONS = 2  # stream of random numbers; those of align.order are 0 and 1
Begun = tuple[WindowMemory, WindowPlan, Sequence[Future[None]]]


@dataclass(frozen=True)
class Source:
    """Rows of a store that are trained on."""

    columns: Columns
    rows: Bool[np.ndarray, "rows"]
    """The rows to go through; each has an image, and a caption at least."""
    text_ok: Bool[np.ndarray, "rows fields"]
    """Captions that can be used."""
    weight: float = 1.0
    """How many of a batch's rows come from here, in proportion to the other sources."""


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
    """This process' share of one step; the next batch overwrites the memory of the features."""

    rows: Int64[np.ndarray, "batch"]
    """Rows of the store; of several, as if they stood one behind the other."""
    image: Float16[Tensor, "batch image_dim"]
    text: Float16[Tensor, "batch captions text_dim"]
    fields: Int64[Tensor, "batch captions"]
    """Caption field of each text, by its number in `Loader.fields`; -1 where the row has no caption
    to use in that field."""
    caption_ids: Int64[Tensor, "batch captions"] | None
    """Equal where the captions are the same string."""


class Stream:
    """The rows of one store, in their order; it can begin at any step."""

    def __init__(
        self, source: Source, order: Order, memories: Sequence[WindowMemory], captions: int
    ) -> None:
        """Take what was planned.

        Args:
            source: The rows.
            order: Their order, in batches of this store's share.
            memories: Two windows; or a resident one twice: the order of the next epoch is then made
                during this one. None if no place of a batch is ours.
            captions: Drawn per image and step.
        """
        self.source = source
        self.order = order
        self.memories = memories
        self.captions = captions
        self._all_usable = bool(source.text_ok[source.rows].all())

    def parts(
        self, first_step: int, stop_step: int
    ) -> Generator[tuple[WindowMemory, StepPart], None, None]:
        """Yield what each step takes of each window, when the window is in memory.

        The next windows are read meanwhile, into the memory that is free. One thread plans the
        windows and the others read, so that these never wait for a plan, nor for the last chunk of
        a window.
        """
        windows = self.order.windows(first_step, stop_step)

        def begin(memory: WindowMemory) -> Begun | None:
            if (window := next(windows, None)) is None:
                return None
            parts = self._cut(window)
            plan = WindowPlan(window, parts if memory.is_resident else list(parts))
            return memory, plan, memory.load(plan, readers)

        device, threads = self.memories[0].device, self.memories[0].threads
        planner = ThreadPoolExecutor(1, "sail-window", set_current, (device,))
        readers = ThreadPoolExecutor(threads, "sail-read", set_current, (device,))
        try:
            coming = deque(planner.submit(begin, memory) for memory in self.memories)
            while (begun := coming.popleft().result()) is not None:
                memory, plan, reads = begun
                for read in reads:
                    read.result()
                for part in plan.parts:
                    yield memory, part
                memory.release()
                coming.append(planner.submit(begin, memory))
        finally:
            planner.shutdown(cancel_futures=True)
            readers.shutdown(cancel_futures=True)

    def _cut(self, window: Window) -> Iterator[StepPart]:
        for step, place, span in self.order.steps(window):
            positions = window.positions[span]
            rows = self.order.store_rows(window, positions)
            if self._all_usable:  # as in most stores; then no row is looked up
                usable = np.broadcast_to(np.True_, (len(rows), len(self.source.columns.text)))
            else:
                usable = self.source.text_ok[rows]
            fields = self._draw(usable, step, place)
            drawn = np.take_along_axis(usable, fields, axis=1)
            yield StepPart(span, positions, rows, fields, drawn)

    def _draw(
        self, usable: Bool[np.ndarray, "part all_fields"], step: int, place: int
    ) -> Int64[np.ndarray, "part captions"]:
        """Choose caption fields for each row, those that can be used before the others."""
        fields = usable.shape[1]
        if self.captions == fields:
            return np.broadcast_to(np.arange(fields), usable.shape)
        order = self.order
        generator = np.random.Generator(np.random.PCG64([order.seed, CAPTIONS, step]))
        ranks = generator.random((order.batch_size, fields), dtype=np.float32)
        first = order.places.start + place
        ranks = ranks[first : first + len(usable)] + ~usable
        chosen = np.argpartition(ranks, self.captions - 1, axis=1)[:, : self.captions]
        return np.sort(chosen, axis=1)


class Loader:
    """A stream of batches that can begin at any step."""

    def __init__(self, sources: Sequence[Source], options: LoaderOptions) -> None:
        """Allocate the memory that all batches will need.

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
        self.steps_per_epoch = (
            sum(int(source.rows.sum()) for source in sources) // options.batch_size
        )
        """Whole batches that one pass over the rows gives."""
        self.fields = tuple(
            dict.fromkeys(name for source in sources for name in source.columns.fields)
        )
        """Names of the caption fields of all sources, which `Batch.fields` numbers."""
        for source, share in zip(sources, parts, strict=True):
            _check_share(source, share, options.batch_size)
        plan = plan_memory(
            [
                Needs(source.columns, share, captions, options.with_caption_ids)
                for source, share in zip(sources, parts, strict=True)
            ],
            device_bytes=options.memory_bytes,
            host_bytes=options.host_memory_bytes if is_gpu(options.device) else 0,
            device=str(options.device),
        )
        self.tier = plan.tier
        self._readers = plan.readers
        self._cache: ChunkCache | None = None
        if options.cache is not None:
            processes = options.ranks
            self._cache = ChunkCache(options.cache, options.cache_bytes, processes=processes)
        self._streams = [
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
        memories = {id(each): each for stream in self._streams for each in stream.memories}.values()
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
            if self.tier == "host":
                yield from _one_ahead(batches, self.options.device)
            else:
                yield from batches

    def keys(self, step: int, count: int) -> list[str]:
        """Return the keys of the first rows of a step, without reading any features."""
        found: list[str] = []
        for stream in self._streams:
            store = stream.source.columns.store
            rows = stream.order.rows(step)[: count - len(found)].tolist()
            found += [str(store.keys(row, row + 1)[0]) for row in rows]
        return found

    def _batches(self, first_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """Gather batch after batch, into as many memories in turn as there are."""
        turns = cycle(zip(self._image, self._text, strict=True))
        with ExitStack() as stack:
            running = [
                stack.enter_context(closing(stream.parts(first_step, stop_step)))
                for stream in self._streams
            ]
            for _ in range(first_step, stop_step):
                yield self._batch(running, *next(turns))

    def _batch(
        self,
        running: Sequence[Iterator[tuple[WindowMemory, StepPart]]],
        image: Float16[Tensor, "batch image_dim"],
        text: Float16[Tensor, "batch captions text_dim"],
    ) -> Batch:
        """Take from each stream the parts that fill its places of a batch.

        Args:
            running: The parts of each stream.
            image: Memory for the features, unless all of them lie in a window in their order.
            text: The same.
        """
        rows = np.empty(len(image), dtype=np.int64)
        fields = np.empty(text.shape[:2], dtype=np.int64)
        ids = np.empty_like(fields) if self.options.with_caption_ids else None
        start = stop = first_row = 0
        for stream, parts in zip(self._streams, running, strict=True):
            stop += len(stream.order.places)
            numbers = np.array([self.fields.index(name) for name in stream.source.columns.fields])
            while start < stop:
                memory, part = next(parts)
                into = slice(start, start + len(part.rows))
                rows[into] = first_row + part.rows
                fields[into] = np.where(part.is_usable, numbers[part.fields], -1)
                if ids is not None:
                    ids[into] = memory.caption_ids(part)
                view = memory.view(part) if len(part.rows) == len(rows) else None
                if view is None:
                    memory.copy(part, image[into], text[into])
                else:
                    image, text = view
                start = into.stop
            first_row += stream.source.columns.store.rows
        device = self.options.device
        return Batch(
            rows=rows,
            image=image,
            text=text,
            fields=to_device(torch.from_numpy(fields), device),
            caption_ids=None if ids is None else to_device(torch.from_numpy(ids), device),
        )

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
    ) -> Sequence[WindowMemory]:
        places, with_ids = len(order.places), self.options.with_caption_ids
        if not places:
            return []
        if is_whole:
            device, chunks = self.options.device, next(order.windows(0, 1)).chunks
            return 2 * [
                ResidentMemory(reader, len(chunks), with_caption_ids=with_ids, device=device)
            ]
        rows = order.chunks_per_window * order.rows_per_chunk
        rows = min(rows, rows * places // order.batch_size + places)
        return [
            StreamingMemory(reader, rows, captions, with_caption_ids=with_ids) for _ in range(2)
        ]


def _one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches that a thread makes, on a stream of its own, while the one before is used.

    Of the two memories of the batches, one is filled as soon as the GPU has made the step that used
    it; what else a batch has is of that stream's memory, and freed after the next step was asked
    for, for which every later batch waits.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def make(used: torch.cuda.Event) -> tuple[Batch | None, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            stream.wait_event(used)
            return next(batches, None), record(device)

    with ThreadPoolExecutor(1, "sail-batch", set_current, (device,)) as background:
        coming = background.submit(make, record(device))
        while True:
            batch, copied = coming.result()
            if batch is None:
                return
            wait_for(copied, device)
            coming = background.submit(make, record(device))
            yield batch


def _places(parts: Sequence[int], options: LoaderOptions) -> Iterator[range]:
    """Yield, for each source, which of its places in a batch this process takes."""
    size = options.batch_size // options.ranks
    first = options.rank * size
    for share in parts:
        yield range(min(max(first, 0), share), max(min(first + size, share), 0))
        first -= share


def _captions(sources: Sequence[Source], captions_per_image: int | None) -> int:
    counts = {len(source.columns.text) for source in sources}
    drawn = {min(captions_per_image or count, count) for count in counts}
    if len(drawn) > 1:
        raise TrainingError(
            f"The stores of align.mix give {sorted(drawn)} captions per image. The same number was "
            f"expected from each. Set align.captions_per_image, or name fields that all of them "
            f"have in align.fields."
        )
    return drawn.pop()


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
