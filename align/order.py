"""The order in which rows are trained on: a function of the seed and the step, without any data.

An epoch goes through all chunks in random order. As many as fit in memory form a window, whose
rows are shuffled, so that a row meets rows of that many random chunks. Batches are cut from the
windows one after the other and may span two. Rows of the last window that would not fill a batch
are dropped; the next epoch drops others.

The places of a batch are divided into lanes, and the rows of a window into as many parts: the
places of a lane take the rows of its part, shuffled. So every batch has rows of all parts; but a
process that takes some of the places reads the chunks of their parts alone, and the order of the
whole is the same for any number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer

CHUNKS, ROWS = 0, 1  # streams of random numbers
LANES, PLACES_PER_LANE = 64, 8  # at most so many lanes, at least so wide
Members = tuple[Integer[np.ndarray, "own_slots"], Int64[np.ndarray, "own_positions"]]


@dataclass(frozen=True)
class Window:
    """Chunks that are in memory at the same time, and the order in which their rows are used."""

    chunks: Integer[np.ndarray, "slots"]
    """Chunks of the store; the n-th is in slot n."""
    positions: Int64[np.ndarray, "positions"]
    """Rows in the order of their use; slot · rows_per_chunk + row in the chunk."""
    first: int
    """Number of the first position, counted over all steps: step · places + place in the step."""


class Order:
    """The windows of every epoch."""

    def __init__(
        self,
        usable: Bool[np.ndarray, "rows"],
        *,
        rows_per_chunk: int,
        chunks_per_window: int,
        batch_size: int,
        seed: int,
        places: range | None = None,
    ) -> None:
        """Count the rows of each chunk.

        Args:
            usable: Which rows to use.
            rows_per_chunk: Rows of one chunk of the store.
            chunks_per_window: Chunks that are in memory at the same time. If these are all chunks,
                every window has them in the same slots, and need not be read again.
            batch_size: Rows per step.
            seed: Of the order; the same seed gives the same order.
            places: Places of each batch that this process fills; all of them if not given.
        """
        self.usable = usable
        self.rows_per_chunk = rows_per_chunk
        self.batch_size = batch_size
        self.seed = seed
        self.places = range(batch_size) if places is None else places
        lanes = max(1, min(LANES, batch_size // PLACES_PER_LANE))
        widths = np.diff(np.arange(lanes + 1) * batch_size // lanes)
        self._lane_of_place = np.repeat(np.arange(lanes, dtype=np.uint8), widths)
        starts = np.arange(0, len(usable), rows_per_chunk)
        counts = np.add.reduceat(usable.astype(np.int64), starts) if len(starts) else starts
        self._chunks = np.flatnonzero(counts)  # a chunk without a row to use is never read
        self._counts = counts
        self.chunks_per_window = min(chunks_per_window, len(self._chunks))
        self.steps_per_epoch = int(counts.sum()) // batch_size

    @property
    def is_resident(self) -> bool:
        """Whether one window holds every row."""
        return self.chunks_per_window == len(self._chunks)

    def windows(self, first_step: int, stop_step: int) -> Iterator[Window]:
        """Yield the windows of some steps, epoch after epoch.

        Their positions are exactly the rows of these steps: those of the first window begin with
        the first row of `first_step`, and rows that fill no batch are left out.
        """
        size, first = self.batch_size, first_step * len(self.places)
        while first_step < stop_step:
            epoch, done = divmod(first_step, self.steps_per_epoch)
            steps = min(self.steps_per_epoch, done + stop_step - first_step)
            for chunks, positions in self._epoch(epoch, done * size, steps * size):
                yield Window(chunks, positions, first)
                first += len(positions)
            first_step += steps - done

    def steps(self, window: Window) -> Iterator[tuple[int, int, slice]]:
        """Yield what each step takes of a window; it may begin or end in the middle of a step.

        Yields:
            The step, the place of its first row among the places of this process, and the span of
            the window's positions.
        """
        start, end = 0, len(window.positions)
        while start < end:
            step, place = divmod(window.first + start, len(self.places))
            stop = min(start + len(self.places) - place, end)
            yield step, place, slice(start, stop)
            start = stop

    def rows(self, step: int) -> Int64[np.ndarray, "places"]:
        """Return the rows of the store that a step is made of, without reading any."""
        rows = [np.empty(0, dtype=np.int64)]  # there is no window where no place is ours
        rows += [self.store_rows(each, each.positions) for each in self.windows(step, step + 1)]
        return np.concatenate(rows)

    def store_rows(
        self, window: Window, positions: Int64[np.ndarray, "batch"]
    ) -> Int64[np.ndarray, "batch"]:
        """Return the rows of the store at positions in a window."""
        shifts = (window.chunks - np.arange(len(window.chunks))) * self.rows_per_chunk
        rows: np.ndarray = positions + shifts[positions // self.rows_per_chunk]
        return rows

    def _epoch(self, epoch: int, start: int, stop: int) -> Iterator[Members]:
        """Yield chunks and positions of each window of the rows `start` to `stop` of an epoch."""
        chunks = self._chunks
        if not self.is_resident:
            chunks = self._generator(CHUNKS, epoch, 0).permutation(chunks)
        before = 0
        for number, slot in enumerate(range(0, len(chunks), self.chunks_per_window)):
            members = chunks[slot : slot + self.chunks_per_window]
            rows = int(self._counts[members].sum())
            first, last = max(start - before, 0), min(stop - before, rows)
            if first < last:
                shuffled, used = self._shuffled(members, before, (epoch, number))
                own = _own_part(members, shuffled[first:last], used, self.rows_per_chunk)
                if len(own[1]):
                    yield own
            before += rows

    def _shuffled(
        self, chunks: Integer[np.ndarray, "slots"], before: int, key: tuple[int, int]
    ) -> tuple[Int64[np.ndarray, "positions"], Bool[np.ndarray, "slots"]]:
        """Shuffle the rows of a window; say which of its chunks have rows of our lanes.

        At the places of other processes is -1.

        Args:
            chunks: Of the window.
            before: Rows of the epoch that come before the window.
            key: Number of the epoch and of the window in it.
        """
        size, places = self.batch_size, self.places
        ordered = self._usable(chunks)
        count = min(len(ordered), self.steps_per_epoch * size - before)  # the others are dropped
        place = (np.arange(count) + before) % size
        lane = self._lane_of_place[place]
        by_lane = np.argsort(lane, kind="stable")  # the places of a lane are behind each other
        starts = np.searchsorted(lane[by_lane], np.arange(self._lane_of_place[-1] + 2))
        parts = starts * len(ordered) // count  # where the rows of each lane begin
        shuffled = np.full(count, -1)
        is_whole = len(places) == size
        used = np.full(len(chunks), is_whole)
        for each in np.unique(self._lane_of_place[places.start : places.stop]).tolist():
            part = ordered[parts[each] : parts[each + 1]]
            index = by_lane[starts[each] : starts[each + 1]]
            rows = self._generator(ROWS, *key, each).permutation(part)
            shuffled[index] = rows[: len(index)]
            used[part // self.rows_per_chunk] = True
        if not is_whole:
            shuffled[(place < places.start) | (place >= places.stop)] = -1
        return shuffled, used

    def _usable(self, chunks: Integer[np.ndarray, "slots"]) -> Int64[np.ndarray, "positions"]:
        size = self.rows_per_chunk
        return np.concatenate(
            [
                slot * size + np.flatnonzero(self.usable[chunk * size : (chunk + 1) * size])
                for slot, chunk in enumerate(chunks.tolist())
            ]
        )

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *key]))


def _own_part(
    chunks: Integer[np.ndarray, "slots"],
    positions: Int64[np.ndarray, "positions"],
    used: Bool[np.ndarray, "slots"],
    rows_per_chunk: int,
) -> Members:
    """Leave out the places of other processes, and the chunks that are not used."""
    if used.all():
        return chunks, positions if (positions >= 0).all() else positions[positions >= 0]
    own = positions[positions >= 0]
    shifts = (np.cumsum(used) - 1 - np.arange(len(used))) * rows_per_chunk
    return chunks[used], own + shifts[own // rows_per_chunk]
