"""How many rows a split has: from its index, its recipe, or a few of its files."""

import time
from dataclasses import dataclass
from pathlib import Path

from features.config import ScenesSource, Source
from features.index import Index
from features.sources import Counts, Shards, open_source
from features.sources.parquet import ImageParquet
from features.storage.files import version
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath

FILES_SAMPLED = 3
SAMPLES_AT_LEAST = 100


@dataclass(frozen=True)
class Rows:
    """The rows of a split."""

    count: int
    found_in: str
    """Where the number comes from, in words."""
    is_exact: bool


def rows_of(index: Path, source: Source, *, given: int | None, seconds: float) -> Rows:
    """Return the rows of a split.

    Args:
        index: Where its index is, if it was indexed.
        source: Its source.
        given: A number that is meant instead, if any.
        seconds: What listing may take.

    Raises:
        SailError: Neither a number nor an index nor the source is there.
    """
    if given is not None:
        return Rows(given, "as given", is_exact=True)
    if index.is_file():
        return Rows(Index.open(index).rows, "its index", is_exact=True)
    if isinstance(source, ScenesSource):
        return Rows(source.rows, "the recipe", is_exact=True)
    found = _listed(open_source(source), seconds)
    if source.rows is not None and source.rows < found.count:
        found = Rows(source.rows, "`rows` of the source", found.is_exact)
    return found


def _listed(shards: Shards, seconds: float) -> Rows:
    """List some files, and take the others to have as many rows for their bytes."""
    files = list(shards.files)
    last = len(files) - 1
    chosen = sorted({0, last // 2, last})[:FILES_SAMPLED]
    rows, sampled_bytes, is_whole = 0, 0.0, True
    deadline = time.monotonic() + seconds
    for number in chosen:
        count, share = _count(shards, files[number], deadline)
        rows += count
        sampled_bytes += share * _bytes(files[number])
        is_whole &= share == 1.0
    if is_whole and len(chosen) == len(files):
        return Rows(rows, "listing its source", is_exact=True)
    remote = any(isinstance(file, RemotePath) for file in files)
    total = sum(in_order(_bytes, files, remote=remote))
    words = f"{len(chosen)} of {len(files)} files"
    return Rows(round(rows * total / max(sampled_bytes, 1e-9)), words, is_exact=False)


def _count(shards: Shards, file: Place, deadline: float) -> tuple[int, float]:
    """Return the samples of a file up to the deadline, and the share of it that was listed."""
    if isinstance(shards, ImageParquet):
        return shards.num_rows(file), 1.0
    count, size = 0, _bytes(file)
    for count, sample in enumerate(shards.samples(file, Counts()), 1):
        is_placed = 0 < sample.offset < size
        if count >= SAMPLES_AT_LEAST and is_placed and time.monotonic() > deadline:
            return count, (sample.offset + sample.size) / size
    return count, 1.0


def _bytes(file: Place) -> float:
    """Return the size of a file, 1 for a folder: those of classes count alike."""
    if isinstance(file, Path) and file.is_dir():
        return 1.0
    return float(next(iter(version(file).values()))[0])
