"""Memory for the features: of all rows, on the device or the host, or of windows of the rows."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int64
from torch import Tensor

from align.chunk_reader import (
    READERS,
    REMOTE_READERS,
    ChunkReader,
    RowsInMemory,
    caption_hashes,
    largest_chunk,
)
from align.columns import Columns
from align.order import Window
from features.device.cuda import is_gpu, record
from features.errors import TrainingError

logger = logging.getLogger(__name__)
MIB = 2**20
BUFFERS_SHARE = 4  # at most one part in so many of the memory is for what threads read into

Features = tuple[Float16[Tensor, "rows image_dim"], Float16[Tensor, "rows captions text_dim"]]


@dataclass(frozen=True)
class StepPart:
    """Rows of a window that one step takes, in their order."""

    span: slice
    """Of the window's positions."""
    positions: Int64[np.ndarray, "part"]
    rows: Int64[np.ndarray, "part"]
    """Of the store."""
    fields: Int64[np.ndarray, "part captions"]
    """Caption fields drawn for each row, by their numbers in the store."""
    is_usable: Bool[np.ndarray, "part captions"]
    """Whether the row has a caption to use in that field."""


@dataclass(frozen=True)
class WindowPlan:
    """A window, and what the steps take of it."""

    window: Window
    parts: Iterable[StepPart]
    """In order; a list if the rows are read in this order, otherwise made when they are used."""


class WindowMemory(ABC):
    """Memory for the features of a window, and on request for a hash of each caption."""

    is_resident = False
    """Whether it holds all rows, so that they can be used in any order."""

    def __init__(
        self,
        reader: ChunkReader,
        images: int,
        captions: int,
        *,
        with_caption_ids: bool,
        device: torch.device,
    ) -> None:
        """Allocate.

        Args:
            reader: Reads the chunks, and says where they lie.
            images: How many.
            captions: How many.
            with_caption_ids: Whether the captions are hashed too.
            device: Where the batches lie.
        """
        self.columns = reader.columns
        self.threads = reader.threads
        self.device = device
        self._reader = reader
        image, text = self.columns.image, self.columns.text[0]
        self._image = RowsInMemory(images, image, reader.memory, device)
        self._text = RowsInMemory(captions, text, reader.memory, device)
        self._with_caption_ids = with_caption_ids
        self._caption_ids = np.empty(captions if with_caption_ids else 0, dtype=np.int64)
        self._used: torch.cuda.Event | None = None
        self.release()  # whoever had this memory before may still be read

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._image.nbytes + self._text.nbytes + self._caption_ids.nbytes

    @abstractmethod
    def load(self, plan: WindowPlan, readers: ThreadPoolExecutor) -> Sequence[Future[None]]:
        """Begin to read a window.

        Args:
            plan: The window.
            readers: The threads that read; a result may be a StoreCorruptError.

        Returns:
            What to wait for.
        """

    @abstractmethod
    def copy(
        self,
        part: StepPart,
        image: Float16[Tensor, "part image_dim"],
        text: Float16[Tensor, "part captions text_dim"],
    ) -> None:
        """Copy the features of a part into the memory of a batch."""

    @abstractmethod
    def caption_ids(self, part: StepPart) -> Int64[np.ndarray, "part captions"]:
        """Return the hashes of the captions of a part; they must have been asked for."""

    @abstractmethod
    def view(self, part: StepPart) -> Features | None:
        """Return the features of a part where they lie, None if they must be copied."""

    def release(self) -> None:
        """Let the rows be overwritten as soon as a GPU has made what was asked of it so far."""
        if is_gpu(self._reader.memory):
            self._used = record(self._reader.memory)


class ResidentMemory(WindowMemory):
    """All chunks that are used, as on disk: every window has the same chunks."""

    is_resident = True

    def __init__(
        self, reader: ChunkReader, chunks: int, *, with_caption_ids: bool, device: torch.device
    ) -> None:
        """Allocate for as many chunks; see `WindowMemory`."""
        self._rows = chunks * reader.columns.image.rows_per_chunk
        captions = len(reader.columns.text) * self._rows
        super().__init__(
            reader, self._rows, captions, with_caption_ids=with_caption_ids, device=device
        )
        self._reads: list[Future[None]] = []

    def load(self, plan: WindowPlan, readers: ThreadPoolExecutor) -> Sequence[Future[None]]:
        """Begin to read all chunks, unless they were read or are being read."""
        if not self._reads or any(map(_has_failed, self._reads)):
            self._reads = [
                readers.submit(self._read_chunk, slot, chunk)
                for slot, chunk in enumerate(plan.window.chunks.tolist())
            ]
        return self._reads

    def copy(
        self,
        part: StepPart,
        image: Float16[Tensor, "part image_dim"],
        text: Float16[Tensor, "part captions text_dim"],
    ) -> None:
        """Gather the features of a part."""
        self._image.gather(part.positions, image)
        self._text.gather(self._captions(part).ravel(), text.flatten(0, 1))

    def caption_ids(self, part: StepPart) -> Int64[np.ndarray, "part captions"]:
        """Gather the hashes of the captions of a part."""
        ids: np.ndarray = self._caption_ids[self._captions(part)]
        return ids

    def view(self, part: StepPart) -> Features | None:
        """Return None: the rows of a part are scattered."""

    def _read_chunk(self, slot: int, chunk: int) -> None:
        size = self.columns.image.rows_per_chunk
        self._reader.read(self.columns.image, chunk, self._image, slot * size)
        for field, column in enumerate(self.columns.text):
            first = field * self._rows + slot * size
            self._reader.read(column, chunk, self._text, first)
            if self._with_caption_ids:
                hashes = caption_hashes(self.columns, field, chunk)
                self._caption_ids[first : first + len(hashes)] = hashes

    def _captions(self, part: StepPart) -> Int64[np.ndarray, "part captions"]:
        places: np.ndarray = part.fields * self._rows + part.positions[:, None]  # field by field
        return places


def _has_failed(read: Future[None]) -> bool:
    """Whether a read was cancelled, as when its stream was closed, or could not be made."""
    return read.cancelled() or (read.done() and read.exception() is not None)


class StreamingMemory(WindowMemory):
    """The rows of a window and the captions drawn for them, each at the place of its use.

    The system puts the rows of a chunk straight to their places (`features.storage.chunks`). Where
    the crc32c is to be looked at first, or there is no such call, a chunk is read into a small
    buffer, which stays in the processor's cache, and its rows go on from there: 1.2 times as long.
    Reading whole chunks to memory and gathering batches from them took 1.5 times as long as that.
    """

    def __init__(
        self, reader: ChunkReader, rows: int, captions: int, *, with_caption_ids: bool
    ) -> None:
        """Allocate.

        Args:
            reader: Reads the chunks, and says where the memory is.
            rows: The most that a window has.
            captions: Drawn for each row.
            with_caption_ids: Whether the captions are hashed too.
        """
        self._captions = captions
        # The last row of each is for what is read and not used.
        super().__init__(
            reader,
            rows + 1,
            rows * captions + 1,
            with_caption_ids=with_caption_ids,
            device=reader.memory,
        )

    def load(self, plan: WindowPlan, readers: ThreadPoolExecutor) -> Sequence[Future[None]]:
        """Begin to read the chunks of a window."""
        if self._used is not None:
            self._used.synchronize()  # batches may still be read from here
        window, fields = plan.window, np.concatenate([part.fields for part in plan.parts])
        order = np.argsort(window.positions, kind="stable")  # by chunk, and by row in the chunk
        starts = np.arange(len(window.chunks) + 1) * self.columns.image.rows_per_chunk
        bounds = np.searchsorted(window.positions[order], starts)
        reads = []
        for slot, chunk in enumerate(window.chunks.tolist()):
            members = order[bounds[slot] : bounds[slot + 1]]
            rows = window.positions[members] - starts[slot]
            reads.append(readers.submit(self._read_images, chunk, rows, members))
            for field in range(len(self.columns.text)):
                job = (field, chunk, rows, members, fields[members] == field)
                reads.append(readers.submit(self._read_captions, *job))
        return reads

    def copy(
        self,
        part: StepPart,
        image: Float16[Tensor, "part image_dim"],
        text: Float16[Tensor, "part captions text_dim"],
    ) -> None:
        """Copy the features of a part, which stand one behind the other."""
        self._image.copy(part.span, image)
        self._text.copy(self._caption_span(part), text.flatten(0, 1))

    def caption_ids(self, part: StepPart) -> Int64[np.ndarray, "part captions"]:
        """Return the hashes of the captions of a part."""
        return self._caption_ids[self._caption_span(part)].reshape(-1, self._captions)

    def view(self, part: StepPart) -> Features | None:
        """Return the features of a part where they lie, None if they are int8 or joined."""
        image, text = self._image.view(part.span), self._text.view(self._caption_span(part))
        if image is None or text is None:
            return None
        return image, text.view(-1, self._captions, text.shape[1])

    def _read_images(
        self, chunk: int, rows: Int64[np.ndarray, "used"], places: Int64[np.ndarray, "used"]
    ) -> None:
        targets = np.full(self.columns.image.rows_per_chunk, len(self._image) - 1)
        targets[rows] = places
        self._reader.scatter(self.columns.image, chunk, self._image, targets)

    def _read_captions(
        self,
        field: int,
        chunk: int,
        rows: Int64[np.ndarray, "used"],
        places: Int64[np.ndarray, "used"],
        is_drawn: Bool[np.ndarray, "used captions"],
    ) -> None:
        which, caption = np.nonzero(is_drawn)
        if not len(which):
            return  # the field was drawn for none of these rows
        targets = np.full(self.columns.image.rows_per_chunk, len(self._text) - 1)
        targets[rows[which]] = places[which] * self._captions + caption
        self._reader.scatter(self.columns.text[field], chunk, self._text, targets)
        if self._with_caption_ids:
            hashes = caption_hashes(self.columns, field, chunk)
            self._caption_ids[targets[: len(hashes)]] = hashes

    def _caption_span(self, part: StepPart) -> slice:
        return slice(part.span.start * self._captions, part.span.stop * self._captions)


@dataclass(frozen=True)
class Needs:
    """What one store needs of the memory."""

    columns: Columns
    share: int
    """Rows of a batch that come from this store."""
    captions: int
    """Drawn per row."""
    with_caption_ids: bool

    @property
    def whole_bytes(self) -> int:
        """Bytes of all chunks of all columns."""
        return (
            self.num_chunks
            * self.columns.image.rows_per_chunk
            * self._row_bytes(len(self.columns.text))
        )

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk in a window, which has the drawn captions alone."""
        return self.columns.image.rows_per_chunk * self._row_bytes(self.captions)

    @property
    def rate(self) -> int:
        """Bytes of the windows that a batch uses up."""
        return self.share * self._row_bytes(self.captions)

    @property
    def num_chunks(self) -> int:
        """Chunks of the store."""
        return self.columns.image.num_chunks

    @property
    def batch_bytes(self) -> int:
        """Bytes of the rows of a batch, and of the same rows as they are on disk where not so."""
        image, text = self.columns.image, self.columns.text[0]
        kinds = [(image, 1), (text, self.captions)]
        size = sum(count * 2 * column.dim for column, count in kinds)
        size += sum(
            count * part.dim for column, count in kinds for part in column.parts if part.is_scaled
        )
        return self.share * size

    def _row_bytes(self, captions: int) -> int:
        text = self.columns.text[0]
        return self.columns.image.row_bytes + captions * (
            text.row_bytes + 8 * self.with_caption_ids
        )


@dataclass(frozen=True)
class Plan:
    """How the memory is used."""

    tier: str
    """`device` or `host`: everything is read once and stays there; `streaming`: windows of it."""
    chunks: tuple[int, ...]
    """Chunks per window, for each store."""
    readers: int
    """Threads per store that read chunks; each has a buffer of one chunk."""


def plan_memory(needs: Sequence[Needs], *, device_bytes: int, host_bytes: int, device: str) -> Plan:
    """Choose where the rows are kept, by their size, and say so in the log.

    Args:
        needs: Of each store.
        device_bytes: For the windows and the batch, on the device.
        host_bytes: For all rows, on the host, if the device has not enough; 0 where the device is
            the host.
        device: Its name, for the log.

    Raises:
        TrainingError: The memory does not hold two chunks of each store and a batch.
    """
    is_remote = any(need.columns.image.is_remote for need in needs)
    wanted = REMOTE_READERS if is_remote else READERS
    left = device_bytes - sum(need.batch_bytes for need in needs)
    everything = sum(need.whole_bytes for need in needs)
    whole = tuple(need.num_chunks for need in needs)
    size = f"{everything / MIB:,.0f} MiB of features"
    if everything <= left:
        logger.info("loader: %s are read once and stay on %s", size, device)
        return Plan("device", whole, wanted)
    if everything <= host_bytes:
        logger.info("loader: %s are read once and stay in host memory (pinned)", size)
        return Plan("host", whole, wanted)
    buffer = sum(largest_chunk(need.columns) for need in needs)
    readers = max(1, min(wanted, left // BUFFERS_SHARE // buffer))
    chunks = _windows(needs, left - readers * buffer, device_bytes)
    rows = [f"{count} of {need.num_chunks}" for count, need in zip(chunks, needs, strict=True)]
    logger.info(
        "loader: %s do not fit in align.memory_mb = %d: streaming windows of %s chunks",
        size,
        device_bytes // MIB,
        ", ".join(rows),
    )
    return Plan("streaming", chunks, readers)


def shares(weights: Sequence[float], batch_size: int) -> list[int]:
    """Divide the places of a batch in proportion to weights; the remainder by largest fraction."""
    exact = np.array(weights) / sum(weights) * batch_size
    parts = np.floor(exact).astype(int)
    for number in np.argsort(parts - exact, kind="stable")[: batch_size - parts.sum()]:
        parts[number] += 1
    return [int(part) for part in parts]


def _windows(needs: Sequence[Needs], left: int, device_bytes: int) -> tuple[int, ...]:
    """Divide the memory so that the windows of all stores last for as many steps.

    A store that fits in its part is kept whole, and what it leaves goes to the others.
    """
    chunks = [0] * len(needs)
    open_ones = list(range(len(needs)))
    while open_ones:
        rates = {each: needs[each].rate for each in open_ones}
        total = sum(rates.values())
        parts = {each: left * rate // total for each, rate in rates.items()}
        whole = [each for each in open_ones if needs[each].whole_bytes <= parts[each]]
        if not whole:
            break
        for each in whole:
            chunks[each] = needs[each].num_chunks
            left -= needs[each].whole_bytes
            open_ones.remove(each)
    for each in open_ones:  # all of its chunks at once would count as whole
        fit = parts[each] // (2 * needs[each].chunk_bytes)
        chunks[each] = min(fit, needs[each].num_chunks - 1)
    if any(count < 1 for count in chunks):
        raise _too_little(needs, device_bytes)
    return tuple(chunks)


def _too_little(needs: Sequence[Needs], device_bytes: int) -> TrainingError:
    batch = sum(need.batch_bytes for need in needs)
    rate = sum(need.rate for need in needs)
    windows = max(-(-2 * need.chunk_bytes * rate // need.rate) for need in needs)
    windows += sum(largest_chunk(need.columns) for need in needs)
    largest = max(need.chunk_bytes for need in needs)
    return TrainingError(
        f"align.memory_mb = {device_bytes // MIB} does not hold two chunks "
        f"({largest / MIB:,.1f} MiB each) and a batch ({batch / MIB:,.1f} MiB). "
        f"At least {-(-(batch + windows) // MIB)} were expected. Raise align.memory_mb, lower "
        f"align.batch_size, or extract with fewer extract.rows_per_chunk."
    )
