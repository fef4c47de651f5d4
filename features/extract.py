"""Stage one: fills the pending chunks of a column, so that the encoder waits as little as can be.

Workers read, decode and tokenise some batches ahead; the calling thread runs the encoder; a writer
thread puts finished chunks on disk. What is ahead is bounded, so memory does not depend on how
many rows there are.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import google_crc32c
import numpy as np
import torch
from jaxtyping import Float16, Int64, Num, UInt8
from torch import Tensor

from features.device.cuda import is_gpu, record, room_for
from features.device.memory import one_memory_error
from features.encoders.image import ImageColumn, ImageEncoder
from features.encoders.packing import Tokens
from features.encoders.text import TextEncoder
from features.errors import SourceError
from features.images import ImageFault
from features.index import Index, SampleReader
from features.status import Status
from features.storage.column import Column, encoder_of, pending_in_any
from features.store import FeatureStore
from features.terminal import harmless

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_LOGGED_FAULTS = 20
MOST_FEW = 4096
"""Different captions of a column that are encoded once for all of it."""


@dataclass
class Phases:
    """Seconds of work by phase. Workers run side by side, so their sum can exceed the clock."""

    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    wait: float = 0.0
    """Seconds the encoder waited for the workers."""
    rows: int = 0
    faults: int = 0
    cut: int = 0  # captions with more tokens than the encoder keeps

    def add(self, other: "Phases") -> None:
        """Count in what another run did of the same column."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def summary(self) -> str:
        """Return one line for the log."""
        cut = f", {self.cut} captions cut at the encoder's length" * bool(self.cut)
        return (
            f"{self.rows} rows, {self.faults} not ok{cut}; seconds: read {self.read:.1f}, decode "
            f"{self.decode:.1f}, encode {self.encode:.1f}, write {self.write:.1f}, encoder waited "
            f"{self.wait:.1f}"
        )


@dataclass(frozen=True)
class ExtractOptions:
    """What every column of one extraction shares."""

    workers: int
    """Threads that decode."""
    should_stop: Callable[[], bool] = lambda: False
    on_rows: Callable[[int], None] = lambda _: None
    phases: Phases = field(default_factory=Phases)
    """Counts the seconds of the work while it is done."""


def extract(
    store: FeatureStore,
    columns: Sequence[Column],
    index: Index,
    encoder: ImageEncoder | TextEncoder,
    options: ExtractOptions,
    chunks: Sequence[int],
) -> Phases:
    """Fill those of some chunks that are pending in any of the columns that one pass fills."""
    if isinstance(encoder, ImageEncoder):
        others = [name for name in store.columns() if name.startswith("image/")]
        seen = [store.column(name) for name in others]
        return extract_images(columns, index, encoder, options, chunks, seen=seen)
    return extract_captions(store, columns, index, encoder, options, chunks)


def extract_captions(
    store: FeatureStore,
    columns: Sequence[Column],
    index: Index,
    encoder: TextEncoder,
    options: ExtractOptions,
    chunks: Sequence[int] | None = None,
) -> Phases:
    """Encode one caption field for the pending chunks of the columns of an encoder.

    Equal captions are encoded once for the column where there are few, else once for a chunk.

    Args:
        store: Where the captions are.
        columns: Filled where they are pending; their names end in that of the caption field.
        index: Tells the rows that are not to be used.
        encoder: What the columns were made for.
        options: What every column of one extraction shares.
        chunks: Look at these chunks alone; at all if not given.
    """
    phases, column = options.phases, columns[0]
    parts = _parts_of(columns, encoder, chunks)
    chunks = pending_in_any(columns, chunks)
    few = _encode_few(store, column, encoder, phases) if len(chunks) else None

    def load(chunk: int) -> tuple[UInt8[np.ndarray, "batch"], np.ndarray, list[Tokens]]:
        started = time.perf_counter()
        captions, status = _captions_of(store, column, index, chunk)
        inverse, tokens, cut = _numbered(captions[status == Status.OK], encoder, few)
        phases.cut += cut
        phases.decode += time.perf_counter() - started
        return status, inverse, tokens

    with ThreadPoolExecutor(1) as pool, Writer(phases) as writer:
        loaded = prefetch(pool, load, chunks, ahead=2, phases=phases)
        for chunk in chunks:
            if options.should_stop():
                break
            status, inverse, tokens = next(loaded)
            started = time.perf_counter()
            encoded = None if few is None else few.features
            if tokens:
                on_texts = _scaled(options.on_rows, len(status), len(tokens))
                encoded = encoder.encode_tokens(tokens, on_texts=on_texts).astype(np.float16)
            else:
                options.on_rows(len(status))
            phases.encode += time.perf_counter() - started
            phases.rows += len(status)
            phases.faults += int((status != Status.OK).sum())
            vectors = None if encoded is None else encoded[inverse]
            for part in parts:
                part.write(chunk, status, vectors, writer, phases)
    return phases


class _CaptionColumn(NamedTuple):
    """A column of captions, where it is pending, and which part of a vector it holds."""

    column: Column
    pending: set[int]
    part: slice

    def write(
        self,
        chunk: int,
        status: UInt8[np.ndarray, "batch"],
        vectors: Float16[np.ndarray, "ok dim"] | None,
        writer: "Writer",
        phases: Phases,
    ) -> None:
        """Hand a chunk to the writer, where it is pending here."""
        if chunk not in self.pending:
            return
        features, _ = empty_chunk(self.column, chunk)
        if vectors is not None:
            features[status == Status.OK] = vectors[:, self.part]
        first = chunk * self.column.rows_per_chunk
        finite = without_infinities(features, status.copy(), first, phases)
        writer.put(self.column, chunk, features, finite)


def _parts_of(
    columns: Sequence[Column], encoder: TextEncoder, chunks: Sequence[int] | None
) -> list[_CaptionColumn]:
    parts, start = dict[str, slice](), 0
    for each in encoder.columns:
        parts[f"text/{each.name}"] = slice(start, start := start + each.dim)
    return [
        _CaptionColumn(column, set(column.pending(chunks)), parts[encoder_of(column.name)])
        for column in columns
    ]


def _captions_of(
    store: FeatureStore, column: Column, index: Index, chunk: int
) -> tuple[np.ndarray, UInt8[np.ndarray, "batch"]]:
    """Return the captions of a chunk, and which of them can be used."""
    start = chunk * column.rows_per_chunk
    stop = start + column.chunk_rows(chunk)
    captions = store.captions(column.name.rsplit("/", 1)[1], start, stop)
    return captions, _caption_status(captions, index, start, stop)


def _numbered(
    captions: np.ndarray, encoder: TextEncoder, few: "_FewCaptions | None"
) -> tuple[np.ndarray, list[Tokens], int]:
    """Return which text each caption is, tokens of those not encoded yet, how many are cut."""
    if few is not None:
        places = few.places(captions)
        return places, [], int(few.is_cut[places].sum())
    distinct, inverse = np.unique(captions, return_inverse=True)
    tokens = encoder.tokenise(texts := distinct.tolist()) if len(distinct) else (texts := [])
    return inverse, tokens, int(encoder.cut(texts, tokens)[inverse].sum())


@dataclass(frozen=True)
class _FewCaptions:
    """The different captions of a column, and their features."""

    numbers: dict[str, int]
    features: Float16[np.ndarray, "texts dim"]
    is_cut: np.ndarray

    def places(self, captions: np.ndarray) -> np.ndarray:
        """Return which of them each caption is."""
        return np.array([self.numbers[caption] for caption in captions.tolist()], dtype=np.int64)


def _encode_few(
    store: FeatureStore, column: Column, encoder: TextEncoder, phases: Phases
) -> _FewCaptions | None:
    """Encode the different captions of a column; None where there are many, or one chunk.

    They are those of the whole column, whatever part of it is pending: so every pass, of whoever,
    encodes the same texts together, and a chunk has the same bytes each time.
    """
    if column.num_chunks < 2:
        return None
    started, found = time.perf_counter(), set[str]()
    field = column.name.rsplit("/", 1)[1]
    for start in range(0, column.rows, column.rows_per_chunk):
        captions = store.captions(field, start, start + column.rows_per_chunk)
        found.update(caption for caption in captions.tolist() if caption.strip())
        if len(found) > MOST_FEW or 2 * len(found) > column.rows:
            return None
    words = "%s: %d different captions in %d rows: each is encoded once"
    logger.info(words, column.name, len(found), column.rows)
    numbers = {text: number for number, text in enumerate(sorted(found))}
    texts = list(numbers)
    tokens = encoder.tokenise(texts)
    encoded = encoder.encode_tokens(tokens).astype(np.float16)
    phases.encode += time.perf_counter() - started
    return _FewCaptions(numbers, encoded, encoder.cut(texts, tokens))


def prefetch(
    pool: ThreadPoolExecutor,
    load: Callable[[Any], T],
    items: Iterable[Any],
    *,
    ahead: int,
    phases: Phases,
) -> Generator[T, None, None]:
    """Yield `load(item)` in order, with at most `ahead` of them loaded or loading."""
    waiting: deque[Future[T]] = deque()
    remaining = iter(items)
    try:
        while True:
            while len(waiting) < ahead and (item := next(remaining, None)) is not None:
                waiting.append(pool.submit(load, item))
            if not waiting:
                return
            started = time.perf_counter()
            value = waiting.popleft().result()
            phases.wait += time.perf_counter() - started
            yield value
    finally:
        for future in waiting:
            future.cancel()


class Writer:
    """Writes chunks on threads of its own: one waits for the disk while the other copies.

    At most two chunks wait or are written, then `put` waits.
    """

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._pool = ThreadPoolExecutor(2)
        self._waiting: deque[Future[float]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)
        if exception[0] is None:
            for future in self._waiting:
                self._phases.write += future.result()  # a full disk is an error, not a warning

    def put(
        self,
        column: Column,
        chunk: int,
        features: Float16[np.ndarray, "batch dim"],
        status: UInt8[np.ndarray, "batch"],
        images: int = 0,
    ) -> None:
        """Hand over a chunk; its arrays must not be changed afterwards."""
        while len(self._waiting) >= 2:
            self._phases.write += self._waiting.popleft().result()
        arguments = (column, chunk, features, status, images)
        self._waiting.append(self._pool.submit(self._write, *arguments))

    def _write(
        self, column: Column, chunk: int, features: np.ndarray, status: np.ndarray, images: int
    ) -> float:
        started = time.perf_counter()
        column.write(chunk, features, status, images)
        return time.perf_counter() - started


def _caption_status(
    captions: np.ndarray, index: Index, start: int, stop: int
) -> UInt8[np.ndarray, "batch"]:
    status = np.full(len(captions), Status.OK, dtype=np.uint8)
    status[np.strings.str_len(np.strings.strip(captions)) == 0] = Status.MISSING_CAPTION
    problems = index.rows_between(start, stop, ("problem",)).column("problem").to_numpy()
    status[problems == Status.DUPLICATE_KEY] = Status.DUPLICATE_KEY
    return status


def empty_chunk(
    column: Column, chunk: int
) -> tuple[Float16[np.ndarray, "batch dim"], UInt8[np.ndarray, "batch"]]:
    """Return zeros for the features and the status of the rows of a chunk."""
    rows = column.chunk_rows(chunk)
    return np.zeros((rows, column.dim), dtype=np.float16), np.zeros(rows, dtype=np.uint8)


def without_infinities(
    features: Float16[np.ndarray, "batch dim"],
    status: UInt8[np.ndarray, "batch"],
    first: int,
    phases: Phases,
) -> UInt8[np.ndarray, "batch"]:
    """Quarantine the rows that hold NaN, or a value that float16 cannot hold."""
    broken = ~np.isfinite(features).all(axis=1)
    if broken.any():
        features[broken] = 0
        status[broken] = Status.NOT_FINITE
        log_faults([f"row {first + i}: not finite" for i in np.flatnonzero(broken)], phases)
        phases.faults += int(broken.sum())
    return status


def log_faults(faults: Sequence[str], phases: Phases) -> None:
    """Name the first faults of a column in the log; `sail inspect` counts them all."""
    for line in faults[: max(0, MAX_LOGGED_FAULTS - phases.faults)]:
        logger.warning("quarantined %s", harmless(line))


def _scaled(on_rows: Callable[[int], None], rows: int, texts: int) -> Callable[[int], None]:
    """Turn "so many distinct texts are done" into rows of the chunk, exact at its end."""
    done = reported = 0

    def on_texts(count: int) -> None:
        nonlocal done, reported
        done += count
        target = rows * done // texts
        on_rows(target - reported)
        reported = target

    return on_texts


class Feeder:
    """Hands batches to an encoder, in smaller pieces once the device has run out of memory."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self.batch_size = encoder.batch_size
        """Images that are encoded at once; never more than the encoder's own setting."""
        self.ahead = 1 if is_gpu(encoder.device) else 0
        """Batches to have on the device before waiting for the first of them."""
        self._encoder = encoder

    def start(
        self, pixels: Num[Tensor, "batch 3 height width"], columns: Sequence[ImageColumn]
    ) -> "Encoding":
        """Begin to encode a batch.

        Raises:
            EncoderError: Not even a single image fits the memory of the device.
        """
        pieces: list[Encoding] = []
        done = 0
        while done < len(pixels):
            piece = pixels[done : done + self.batch_size]
            encoding = self._try(piece, columns)
            if encoding is None:
                self._halve(len(piece))
                continue
            pieces.append(encoding)
            done += len(piece)
        return lambda: [
            np.concatenate(parts) for parts in zip(*(wait() for wait in pieces), strict=True)
        ]

    def _try(self, pixels: Tensor, columns: Sequence[ImageColumn]) -> "Encoding | None":
        """Begin to encode some images; None if the device has not the memory."""
        try:
            with one_memory_error():  # pinned memory too
                return _to_host(self._encoder.encode(pixels, columns, batch_size=self.batch_size))
        except torch.OutOfMemoryError:
            return None

    def _halve(self, images: int) -> None:
        name, device = self._encoder.name, self._encoder.device
        if images == 1:
            raise self._encoder.without_room()
        self.batch_size = images // 2
        if is_gpu(device):
            torch.cuda.empty_cache()  # in pieces of the old size it is of no use
        logger.warning(
            "image encoder %s: out of memory on %s with %d images at once; goes on with %d",
            name,
            device,
            images,
            self.batch_size,
        )


Encoding = Callable[[], list[Float16[np.ndarray, "batch _"]]]
"""Waits for the features of a batch, one array for each column."""


def _to_host(features: Sequence[Tensor]) -> Encoding:
    """Begin to copy features to the host as float16."""
    halves = [each.half() for each in features]
    device = halves[0].device
    if not is_gpu(device):
        arrays = [each.cpu().numpy() for each in halves]
        return lambda: arrays
    copies = [room_for(device, each.shape, each.dtype) for each in halves]
    for copy, half in zip(copies, halves, strict=True):
        copy.copy_(half, non_blocking=True)
    copied = record(device)

    def wait() -> list[np.ndarray]:
        copied.synchronize()
        return [copy.numpy() for copy in copies]

    return wait


PART_ROWS = 32
"""Rows that one worker decodes: few, so that all help with the first batch."""


def extract_images(
    columns: Sequence[Column],
    index: Index,
    encoder: ImageEncoder,
    options: ExtractOptions,
    chunks: Sequence[int] | None = None,
    *,
    seen: Sequence[Column] = (),
) -> Phases:
    """Encode the images of every chunk that is pending in any of an encoder's columns.

    Each image is decoded and encoded once, and only what is pending is computed and written. A row
    whose image cannot be read keeps its place: zeros, and a status that says why. When
    `options.should_stop()` turns true the chunk at hand is finished first.

    Args:
        columns: Columns made for `encoder`.
        index: Where the images are.
        encoder: Has a column of the same name for each.
        options: What every column of one extraction shares.
        chunks: Look at these chunks alone; at all if not given.
        seen: Columns of the store that were made of the same images.

    Raises:
        SourceError: Images of a chunk are other bytes than when a column of `seen` was made.
    """
    phases = options.phases
    reader = SampleReader(index, max_pixels=encoder.max_pixels)
    feeder = Feeder(encoder)
    made_by = {f"image/{column.name}": column for column in encoder.columns}
    parts = _parts(columns, chunks, encoder)
    ahead = options.workers + 2 + encoder.batch_size // PART_ROWS
    on_device: deque[tuple[_Batch, Places, Encoding]] = deque()

    def load(part: tuple[_Batch, range]) -> tuple[_Batch, range, Phases, list[str]]:
        return *part, *_load(*part, reader, encoder)

    with ThreadPoolExecutor(options.workers) as pool, Writer(phases) as writer:
        with closing(prefetch(pool, load, parts, ahead=ahead, phases=phases)) as all_loaded:
            for batch, rows, spent, faults in all_loaded:
                if rows.start == batch.chunk.start and options.should_stop():
                    break
                log_faults(faults, phases)
                phases.add(spent)
                if rows.stop < batch.stop:
                    continue
                started = time.perf_counter()
                wanted = [made_by[column.name] for column in batch.chunk.columns]
                places, pixels = batch.decoded()
                on_device.append((batch, places, feeder.start(pixels, wanted)))
                phases.encode += time.perf_counter() - started
                if batch.stop == batch.chunk.stop:
                    _check_images(batch.chunk, index, seen)
                while len(on_device) > feeder.ahead:
                    _finish(*on_device.popleft(), writer, options, phases)
        while on_device:
            _finish(*on_device.popleft(), writer, options, phases)
    return phases


class _Chunk:
    """What one chunk becomes in the columns in which it is pending."""

    def __init__(self, number: int, columns: Sequence[Column]) -> None:
        self.number = number
        self.columns = columns
        self.start = number * columns[0].rows_per_chunk
        self.features = [empty_chunk(column, number)[0] for column in columns]
        self.status = empty_chunk(columns[0], number)[1]
        self.stop = self.start + len(self.status)
        self.crcs = np.zeros(len(self.status), dtype="<u4")
        """The crc32c of the encoded image of each row, 0 where there is none."""

    @property
    def images(self) -> int:
        """The checksum of all its images; 0 if it has none."""
        return google_crc32c.value(self.crcs.tobytes()) if self.crcs.any() else 0


Places = Int64[np.ndarray, "ok"]


@dataclass(frozen=True)
class _Batch:
    """Rows `start` to `stop` of the store, all in one chunk, and room for their pixels."""

    chunk: _Chunk
    start: int
    stop: int
    pixels: Num[Tensor, "batch 3 height width"]

    @property
    def status(self) -> UInt8[np.ndarray, "batch"]:
        """A view of the status of the chunk."""
        return self.chunk.status[self.start - self.chunk.start : self.stop - self.chunk.start]

    def decoded(self) -> tuple[Places, Num[Tensor, "ok 3 height width"]]:
        """Return which rows could be decoded, by their place in the batch, and their pixels.

        The last of them take the places of those that could not, so that the pixels stay in the
        memory that a GPU copies from by itself.
        """
        places = np.flatnonzero(self.status == Status.OK)
        last = places[places >= len(places)]
        holes = np.flatnonzero(self.status[: len(places)] != Status.OK)
        pixels = self.pixels.numpy()
        pixels[holes] = pixels[last]
        places = np.arange(len(places))
        places[holes] = last
        return places, self.pixels[: len(places)]


def _parts(
    columns: Sequence[Column], chunks: Sequence[int] | None, encoder: ImageEncoder
) -> Iterator[tuple[_Batch, range]]:
    """Yield batches with the rows of them that one worker decodes; no two share a row."""
    numbers = pending_in_any(columns, chunks)
    pending = {column.name: set(column.pending(numbers)) for column in columns}
    for number in numbers:
        chunk = _Chunk(number, [each for each in columns if number in pending[each.name]])
        for start in range(chunk.start, chunk.stop, encoder.batch_size):
            stop = min(start + encoder.batch_size, chunk.stop)
            batch = _Batch(chunk, start, stop, encoder.room_for(stop - start))
            for first in range(start, stop, PART_ROWS):
                yield batch, range(first, min(first + PART_ROWS, stop))


def _load(
    batch: _Batch, rows: range, reader: SampleReader, encoder: ImageEncoder
) -> tuple[Phases, list[str]]:
    """Put pixels and status of some rows in their places; say what it took, and what is wrong."""
    begun = time.perf_counter()
    samples = reader.read(rows.start, rows.stop)
    table = reader.index.rows_between(rows.start, rows.stop, ("problem", "key", "path"))
    problems, keys, paths = (table.column(name).to_pylist() for name in ("problem", "key", "path"))
    read = time.perf_counter()
    faults = []
    pixels, first = batch.pixels.numpy(), rows.start - batch.start
    for i, data in enumerate(samples):
        if data is not None and not reader.index.has_boxes:  # a part of an image is encoded anew
            batch.chunk.crcs[rows[i] - batch.chunk.start] = google_crc32c.value(data)
        try:
            if problems[i] or data is None:
                raise ImageFault(Status(problems[i] or Status.MISSING_IMAGE), paths[i])
            pixels[first + i] = encoder.prepare(data)
            batch.status[first + i] = Status.OK
        except ImageFault as fault:
            batch.status[first + i] = fault.status
            what = f"{fault.status.label}, {fault.reason}"
            faults.append(f"row {rows[i]} ({keys[i]}): {what}")
    decoded = time.perf_counter() - read
    return Phases(read=read - begun, decode=decoded, faults=len(faults)), faults


def _check_images(chunk: _Chunk, index: Index, seen: Sequence[Column]) -> None:
    for column in seen:
        if (identities := column.identities) is None or column.pending([chunk.number]):
            continue
        if (then := identities.of(chunk.number).images) and chunk.images not in (0, then):
            paths = index.rows_between(chunk.start, chunk.stop, ("path",)).column("path")
            files = list(dict.fromkeys(paths.to_pylist()))
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            raise SourceError(
                f"The images of rows {chunk.start} to {chunk.stop - 1} ({files[0]}{more}) are "
                f"other bytes (crc32c {chunk.images:08x}) than those that {column.name} was made "
                f"of ({then:08x}), though the files' size and time are as indexed. Put the files "
                f"back as they were, or extract into a new run."
            )


def _finish(
    batch: _Batch,
    places: Places,
    encoding: Encoding,
    writer: Writer,
    options: ExtractOptions,
    phases: Phases,
) -> None:
    """Put the features of a batch in their places, and write the chunk if it is the last of it."""
    started = time.perf_counter()
    chunk = batch.chunk
    if len(places):
        for target, features in zip(chunk.features, encoding(), strict=True):
            target[batch.start - chunk.start + places] = features
    phases.encode += time.perf_counter() - started
    phases.rows += batch.stop - batch.start
    options.on_rows(batch.stop - batch.start)
    if batch.stop == chunk.stop:
        for column, features in zip(chunk.columns, chunk.features, strict=True):
            status = without_infinities(features, chunk.status.copy(), chunk.start, phases)
            writer.put(column, chunk.number, features, status, chunk.images)
