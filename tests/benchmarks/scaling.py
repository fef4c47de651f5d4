"""Two worker processes against one, each with a single-threaded encoder, on two cores.

DINOv2-B architecture with random weights, 224-pixel pictures from a tar, `sail extract --workers`.
Measured is the steady part: the workers have started and loaded the encoder on a first split, and
the clock runs over a second one. The two are measured in turn, and in the same round two bare
encoders in processes of their own against one: what the machine gives, with nothing around them.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from threading import Barrier

import torch
from transformers import AutoModel

from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.cluster import open_cluster
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny
from tests.benchmarks.extraction import BASE, random_dinov2
from tests.benchmarks.figure import Figure, figure_of
from tests.photographs import as_jpeg, synthetic

NO_ENCODERS = ["encoders.image={}"]
DISTINCT = 8


def write_run(folder: Path, images: int, warm: int) -> Path:
    """Write shards, an encoder and a run file for one processor thread per worker."""
    jpegs = [as_jpeg(synthetic(seed, 500, 375)) for seed in range(DISTINCT)]
    for name, count in [("warm", warm), ("timed", images)]:
        members = ((f"{i:06d}.jpg", jpegs[i % DISTINCT]) for i in range(count))
        tiny.write_tar(folder / f"{name}.tar", members)
    random_dinov2(folder / "dino", **BASE)
    run_file = folder / "scaling.toml"
    run_file.write_text(
        """
[run]
threads = 1
[data.warm]
kind = "webdataset"
path = "warm.tar"
[data.timed]
kind = "webdataset"
path = "timed.tar"
[encoders.image.dino]
model = "dino"
batch_size = 8
[extract]
rows_per_chunk = 8
workers = 1
[align]
split = "timed"
"""
    )
    return run_file


def rows_per_second(run_file: Path, run: Path, workers: int) -> float:
    """Extract with so many workers, and return the speed over the second split."""
    overrides = [f"run.dir='{run}'"]
    paths = extract(load_config(str(run_file), [*overrides, *NO_ENCODERS]), StopRequest())
    warm, timed = [FeatureStore.open(path) for path in paths]
    config = load_config(str(run_file), overrides)
    with open_cluster(config, workers=workers) as cluster:
        cluster.fill_encoder([warm], "image/dino", StopRequest())
        started = time.perf_counter()
        cluster.fill_encoder([timed], "image/dino", StopRequest())
        return timed.rows / (time.perf_counter() - started)


def encode_alone(model: Path, images: int, start: Barrier, end: Barrier) -> None:
    """Encode drawn pixels in this process, between two barriers that all processes pass."""
    torch.set_num_threads(1)
    encoder = AutoModel.from_pretrained(model)
    pixels = torch.rand(8, 3, 224, 224)
    with torch.inference_mode():
        encoder(pixels)
        start.wait()
        for _ in range(images // 8):
            encoder(pixels)
    end.wait()


def bare_images_per_second(model: Path, images: int, processes: int) -> float:
    """Return the speed of so many bare encoders together, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    start, end = context.Barrier(processes + 1), context.Barrier(processes + 1)
    children = [
        context.Process(target=encode_alone, args=(model, images, start, end), daemon=True)
        for _ in range(processes)
    ]
    for child in children:
        child.start()
    start.wait()
    started = time.perf_counter()
    end.wait()
    seconds = time.perf_counter() - started
    for child in children:
        child.join()
    return processes * images / seconds


def measure(images: int = 64, warm: int = 16, rounds: int = 3) -> list[Figure]:
    """Return the ratio of the two speeds, 2 being workers that cost each other nothing."""
    ratios, bare = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_file = write_run(folder, images, warm)
        for number in range(rounds):
            one = rows_per_second(run_file, folder / f"one-{number}", 1)
            two = rows_per_second(run_file, folder / f"two-{number}", 2)
            ratios.append(two / one)
            alone = [bare_images_per_second(folder / "dino", images // 4, n) for n in (1, 2)]
            bare.append(alone[1] / alone[0])
    return [
        figure_of(
            "extraction with two workers / one worker",
            ratios,
            unit="ratio of rows/s",
            goal=1.8,
            direction="min",
            module="scaling",
        ),
        figure_of(
            "two bare encoders in two processes / one",
            bare,
            unit="ratio of images/s",
            goal=None,
            direction="min",
            module="scaling",
        ),
    ]


if __name__ == "__main__":  # worker processes import this file too
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
