"""Where the loader keeps what: all of it on the device, all of it on the host, or windows of it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.selection import Columns
from features.errors import TrainingError

logger = logging.getLogger(__name__)
MIB = 2**20


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
    def row_bytes(self) -> int:
        """Bytes of a row in a window."""
        columns = self.columns
        ids = 8 * len(columns.text) * self.with_caption_ids
        return ids + sum(column.row_bytes for column in (columns.image, *columns.text))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of all columns in a window."""
        return self.columns.image.rows_per_chunk * self.row_bytes

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


@dataclass(frozen=True)
class Plan:
    """How the memory is used."""

    tier: str
    """`device` or `host`: everything is read once and stays there; `streaming`: windows of it."""
    chunks: tuple[int, ...]
    """Chunks per window, for each store."""


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
    left = device_bytes - sum(need.batch_bytes for need in needs)
    everything = sum(need.num_chunks * need.chunk_bytes for need in needs)
    whole = tuple(need.num_chunks for need in needs)
    size = f"{everything / MIB:,.0f} MiB of features"
    if everything <= left:
        logger.info("loader: %s are read once and stay on %s", size, device)
        return Plan("device", whole)
    if everything <= host_bytes:
        logger.info("loader: %s are read once and stay in host memory (pinned)", size)
        return Plan("host", whole)
    chunks = _windows(needs, left, device_bytes)
    rows = [f"{count} of {need.num_chunks}" for count, need in zip(chunks, needs, strict=True)]
    logger.info(
        "loader: %s do not fit in align.memory_mb = %d: streaming windows of %s chunks",
        size,
        device_bytes // MIB,
        ", ".join(rows),
    )
    return Plan("streaming", chunks)


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
        rates = {each: needs[each].share * needs[each].row_bytes for each in open_ones}
        total = sum(rates.values())
        parts = {each: left * rate // total for each, rate in rates.items()}
        whole = [
            each
            for each in open_ones
            if needs[each].num_chunks * needs[each].chunk_bytes <= parts[each]
        ]
        if not whole:
            break
        for each in whole:
            chunks[each] = needs[each].num_chunks
            left -= needs[each].num_chunks * needs[each].chunk_bytes
            open_ones.remove(each)
    for each in open_ones:
        chunks[each] = parts[each] // (2 * needs[each].chunk_bytes)
    if any(count < 1 for count in chunks):
        raise _too_little(needs, device_bytes)
    return tuple(chunks)


def _too_little(needs: Sequence[Needs], device_bytes: int) -> TrainingError:
    batch = sum(need.batch_bytes for need in needs)
    rate = sum(need.share * need.row_bytes for need in needs)
    windows = max(
        -(-2 * need.chunk_bytes * rate // (need.share * need.row_bytes)) for need in needs
    )
    largest = max(need.chunk_bytes for need in needs)
    return TrainingError(
        f"align.memory_mb = {device_bytes // MIB} does not hold two chunks "
        f"({largest / MIB:,.1f} MiB each) and a batch ({batch / MIB:,.1f} MiB). "
        f"At least {-(-(batch + windows) // MIB)} were expected. Raise align.memory_mb, lower "
        f"align.batch_size, or extract with fewer extract.rows_per_chunk."
    )
