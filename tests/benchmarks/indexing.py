"""Samples per second of an index over a local tar, one core, beside a listing by `tarfile`.

The samples have an image of 700 bytes and a JSON caption, so that the work is all in the headers
and the captions. What counts is the processor time of the process (all its threads), so that
neighbours disturb it little; the tar is in the page cache. `tarfile` lists the headers alone.
"""

import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from features.config import WebdatasetSource
from features.index import Index
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import webdataset_shards


def seconds_of_tarfile(path: Path) -> float:
    """Read every header with the standard library."""
    started = time.process_time()
    with tarfile.open(path, "r:") as tar:
        for _ in tar:
            pass
    return time.process_time() - started


def seconds_of_index(path: Path, index: Path) -> float:
    """Build the complete index: headers, captions, the parquet file."""
    started = time.process_time()
    Index.build(WebdatasetSource(kind="webdataset", path=str(path)), index)
    return time.process_time() - started


def measure(samples: int = 100_000, rounds: int = 5) -> list[Figure]:
    """Return samples per second, and how many times as fast as `tarfile` alone."""
    rates, ratios = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        webdataset_shards(folder, shards=1, samples=samples)
        for _ in range(rounds):
            headers = seconds_of_tarfile(folder / "00000.tar")
            seconds = seconds_of_index(folder / "00000.tar", folder / "index.parquet")
            rates.append(samples / seconds)
            ratios.append(headers / seconds)
    return [
        figure_of(
            "indexing, local tar",
            rates,
            unit="samples/s of a core",
            goal=50_000,
            direction="min",
            module="indexing",
        ),
        figure_of(
            "indexing / tarfile listing headers alone",
            ratios,
            unit="ratio of samples/s",
            goal=None,
            direction="min",
            module="indexing",
        ),
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
