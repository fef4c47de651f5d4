"""Seconds of a second `sail extract` on a finished store, process start included.

A million samples in a hundred tars (hard links to one), an image and a caption column of small real
encoders. Index and store are made by the program; the columns are filled with ones, since what they
hold is not looked at. How large the encoders are does not matter: their weights are not read.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from features.status import Status
from features.storage.column import Column
from features.store import FeatureStore
from pipeline.interrupt import Stopped
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.run.folder import RunFolder
from tests import tiny
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import webdataset_shards
from tests.feature_stores import StopBeforeChunks

RUN_FILE = """
[run]
dir = "{run}"
[data.train]
kind = "webdataset"
path = "shards/*.tar"
[encoders.image.vit]
model = "vit"
[encoders.text.bert]
model = "bert"
max_length = 32
"""


def finished_run(folder: Path, *, shards: int, samples: int) -> Path:
    """Make a run of which nothing is left to do; return its run file."""
    webdataset_shards(folder / "shards", shards=shards, samples=samples)
    tiny.image_encoder(folder / "vit")
    tiny.text_encoder(folder / "bert")
    run_file = folder / "finished.toml"
    run_file.write_text(RUN_FILE.format(run=folder / "run"))
    config = load_config(str(run_file))
    for _ in range(len(config.encoders.image) + len(config.encoders.text)):
        with contextlib.suppress(Stopped):
            extract(config, StopBeforeChunks(config.run.dir))  # makes the columns of one more
        store = FeatureStore.open(RunFolder(config.run.dir).store("train"))
        for name in store.columns():
            _fill(store.column(name))
    return run_file


def _fill(column: Column) -> None:
    for chunk in column.pending():
        rows = column.chunk_rows(chunk)
        features = np.ones((rows, column.dim), dtype=np.float16)
        column.write(chunk, features, np.full(rows, Status.OK, dtype=np.uint8))


def seconds_of(*command: str) -> float:
    """Time a Python process from its start to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(shards: int = 100, samples: int = 10_000, rounds: int = 5) -> list[Figure]:
    """Return the seconds, and how much of an `import torch` they are."""
    seconds, ratios = [], []
    with tempfile.TemporaryDirectory() as name:
        run_file = finished_run(Path(name), shards=shards, samples=samples)
        for _ in range(rounds):
            torch = seconds_of("-c", "import torch")
            seconds.append(seconds_of("-m", "pipeline.cli", "extract", str(run_file)))
            ratios.append(seconds[-1] / torch)
    rows = f"{shards * samples:,} rows"
    return [
        figure_of(
            f"second extract of {rows}",
            seconds,
            unit="s",
            goal=3.0,
            direction="max",
            module="finished",
        ),
        figure_of(
            f"second extract of {rows} / import torch",
            ratios,
            unit="ratio of seconds",
            goal=None,
            direction="max",
            module="finished",
        ),
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
