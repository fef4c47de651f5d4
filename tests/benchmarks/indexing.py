"""Samples per second of an index over a local tar, one core, beside a listing by `tarfile`.

The samples have an image and a JSON caption. What counts is the processor time of the process, all
its threads, so that neighbours disturb it little; the tar is in the page cache. `tarfile` lists
the headers alone.
"""

import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from features.index import build_index
from features.sources.webdataset import WebdatasetSource
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
    build_index(WebdatasetSource(kind="webdataset", path=str(path)).open(), index)
    return time.process_time() - started


def measure(samples: int = 100_000, rounds: int = 5) -> list[Figure]:
    """Return samples per second, and how many times as fast as `tarfile` alone."""
    return [
        *_figures(samples, 0, "images of 0.7 kB", rounds),
        *_figures(samples // 4, 30_000, "images of 30 kB", rounds),
    ]


def _figures(samples: int, image_bytes: int, what: str, rounds: int) -> list[Figure]:
    rates, ratios = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        webdataset_shards(folder, shards=1, samples=samples, image_bytes=image_bytes)
        for _ in range(rounds):
            headers = seconds_of_tarfile(folder / "00000.tar")
            seconds = seconds_of_index(folder / "00000.tar", folder / "index.parquet")
            rates.append(samples / seconds)
            ratios.append(headers / seconds)
    return [
        figure_of(
            f"indexing a local tar, {what}",
            rates,
            unit="samples/s of a core",
            goal=50_000,
            direction="min",
            module="indexing",
        ),
        figure_of(
            f"indexing / tarfile listing headers alone, {what}",
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
