"""Where the loader keeps what: all of it on the device, all of it on the host, or windows of it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.chunks import READERS, REMOTE_READERS, largest_chunk
from align.selection import Columns
from features.errors import TrainingError

logger = logging.getLogger(__name__)
MIB = 2**20
BUFFERS_SHARE = 4  # at most one part in so many of the memory is for what threads read into


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
        size += sum(count * column.dim for column, count in kinds if column.is_scaled)
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
