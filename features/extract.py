"""Stage one: fills the pending chunks of a column, so that the encoder waits as little as can be.

Workers read, decode and tokenise some batches ahead; the calling thread runs the encoder; a writer
thread puts finished chunks on disk. What is ahead is bounded, so memory does not depend on how
many rows there are.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float16, UInt8

from features.column import Column
from features.encoders.packing import Tokens
from features.encoders.text import TextEncoder
from features.index import Index
from features.status import Status
from features.store import FeatureStore

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_LOGGED_FAULTS = 20


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

    def add(self, other: "Phases") -> None:
        """Count in what another run did of the same column."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def summary(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.rows} rows, {self.faults} not ok; seconds: read {self.read:.1f}, decode "
            f"{self.decode:.1f}, encode {self.encode:.1f}, write {self.write:.1f}, encoder waited "
            f"{self.wait:.1f}"
        )


@dataclass(frozen=True)
class Run:
    """What every column of one extraction shares."""

    workers: int
    max_pixels: int
    should_stop: Callable[[], bool] = lambda: False
    on_rows: Callable[[int], None] = lambda _: None


def extract_captions(
    store: FeatureStore,
    column: Column,
    index: Index,
    encoder: TextEncoder,
    run: Run,
    chunks: Sequence[int] | None = None,
) -> Phases:
    """Encode one caption field for the pending chunks of a column; equal captions once a chunk.

    Args:
        store: Where the captions are.
        column: Filled where it is pending; its name ends in that of the caption field.
        index: Tells the rows that are not to be used.
        encoder: What the column was made for.
        run: What every column of one extraction shares.
        chunks: Look at these chunks alone; at all if not given.
    """
    phases = Phases()
    caption_field = column.name.rsplit("/", 1)[1]
    chunks = column.pending(chunks)

    def load(chunk: int) -> tuple[UInt8[np.ndarray, "batch"], np.ndarray, list[Tokens]]:
        started = time.perf_counter()
        start = chunk * column.rows_per_chunk
        stop = start + column.chunk_rows(chunk)
        captions = store.captions(caption_field, start, stop)
        status = _caption_status(captions, index, start, stop)
        distinct, inverse = np.unique(captions[status == Status.OK], return_inverse=True)
        tokens = encoder.tokenise(distinct.tolist()) if len(distinct) else []
        phases.decode += time.perf_counter() - started
        return status, inverse, tokens

    with ThreadPoolExecutor(1) as pool, Writer(phases) as writer:
        loaded = prefetch(pool, load, chunks, ahead=2, phases=phases)
        for chunk in chunks:
            if run.should_stop():
                break
            status, inverse, tokens = next(loaded)
            features, _ = empty_chunk(column, chunk)
            started = time.perf_counter()
            if tokens:
                encoded = encoder.encode_tokens(
                    tokens, on_texts=_scaled(run.on_rows, len(status), len(tokens))
                )
                features[status == Status.OK] = encoded.astype(np.float16)[inverse]
            else:
                run.on_rows(len(status))
            phases.encode += time.perf_counter() - started
            phases.rows += len(status)
            phases.faults += int((status != Status.OK).sum())
            first = chunk * column.rows_per_chunk
            writer.put(column, chunk, features, without_infinities(features, status, first, phases))
    return phases


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
    """Writes chunks on a thread of its own; at most two wait, then `put` does."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)
        if exception[0] is None:
            for future in self._waiting:
                future.result()  # a full disk is an error, not a warning

    def put(
        self,
        column: Column,
        chunk: int,
        features: Float16[np.ndarray, "batch dim"],
        status: UInt8[np.ndarray, "batch"],
    ) -> None:
        """Hand over a chunk; its arrays must not be changed afterwards."""
        while len(self._waiting) >= 2:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, column, chunk, features, status))

    def _write(self, column: Column, chunk: int, features: np.ndarray, status: np.ndarray) -> None:
        started = time.perf_counter()
        column.write(chunk, features, status)
        self._phases.write += time.perf_counter() - started


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
        # What data name must not steer the terminal.
        shown = (each if each.isprintable() else ascii(each)[1:-1] for each in line)
        logger.warning("quarantined %s", "".join(shown))


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
