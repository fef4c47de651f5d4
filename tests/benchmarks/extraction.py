"""Stage one end to end against the bare encoder fed with decoded tensors, in one run.

A DINOv2 of random weights at 224 pixels, JPEGs of 500 × 375 pixels in a tar. The bare encoder and
each mode take turns, and every round begins with another of them, so that a change of the machine's
speed meets all alike.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

from features.config import ImageEncoderConfig
from features.encoders import ImageEncoder, load_image_encoder
from features.extract import ExtractOptions, extract_images
from features.index import Index, build_index
from features.sources.webdataset import WebdatasetSource
from features.store import FeatureStore
from pipeline.run.cpu import keep_freed_memory, usable_processors
from tests import tiny
from tests.benchmarks.figure import Figure, figure_of
from tests.photographs import as_jpeg, synthetic

SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}
MODES: tuple[Literal["exact", "fast"], ...] = ("exact", "fast")
LIMIT = 10**8


def random_dinov2(folder: Path, **size: int) -> Path:
    """Write a DINOv2 of random weights in Hugging Face layout."""
    config = Dinov2Config(**size, image_size=518, patch_size=14)
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@dataclass(frozen=True)
class Task:
    """Some images to be encoded by a model on a device."""

    folder: Path
    model: Path
    device: torch.device
    images: int
    distinct: int
    """How many of the images differ: of these the tensors are kept."""
    batch_size: int

    @cached_property
    def jpegs(self) -> list[bytes]:
        """The images that differ."""
        return [as_jpeg(synthetic(seed, 500, 375)) for seed in range(self.distinct)]

    @cached_property
    def index(self) -> Index:
        """All images, in one tar."""
        members = [
            member
            for i in range(self.images)
            for member in [(f"{i:08d}.jpg", self.jpegs[i % self.distinct]), (f"{i:08d}.txt", b"a")]
        ]
        tar = tiny.write_tar(self.folder / "photographs.tar", members)
        return build_index(
            WebdatasetSource(kind="webdataset", path=str(tar)).open(), self.folder / "index.parquet"
        )

    def encoder(self, mode: Literal["exact", "fast"], **settings: Any) -> ImageEncoder:
        """Load the encoder."""
        config = ImageEncoderConfig(
            model=str(self.model), batch_size=self.batch_size, mode=mode, **settings
        )
        return load_image_encoder("dinov2", config, self.device, LIMIT)

    def bare(self, encoder: ImageEncoder) -> Callable[[], float]:
        """Return what times the encoder alone, on pixels that are decoded already."""
        pixels = [encoder.prepare(data) for data in self.jpegs]
        batches = [
            torch.from_numpy(np.stack(pixels[start : start + self.batch_size]))
            for start in range(0, self.distinct, self.batch_size)
        ]
        if self.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        encoder.encode(batches[0])  # warm

        def seconds() -> float:
            started = time.perf_counter()
            features = [
                encoder.encode(batch)[0].half()
                for _ in range(self.images // self.distinct)
                for batch in batches
            ]
            torch.cat(features).cpu()
            return time.perf_counter() - started

        return seconds

    def end_to_end(self, encoder: ImageEncoder) -> Callable[[], float]:
        """Return what times reading, decoding, encoding and writing."""

        def seconds() -> float:
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                store = FeatureStore.create(Path(name) / "s.zarr", self.index, rows_per_chunk=4096)
                (made,) = encoder.columns
                store.add_encoder("image/dinov2", made.fingerprint, dim=made.dim)
                columns = [store.column("image/dinov2")]
                options = ExtractOptions(workers=usable_processors())
                started = time.perf_counter()
                extract_images(columns, self.index, encoder, options)
                return time.perf_counter() - started

        return seconds


def in_turns(works: list[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Time some works in turn, each round beginning with another; the seconds of each."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        for place in range(len(works)):
            which = (number + place) % len(works)
            seconds[which].append(works[which]())
    return seconds


def ratio_figures(task: Task, name: str, *, goal: float, rounds: int, module: str) -> list[Figure]:
    """Return bare seconds / end-to-end seconds of both modes, and the images/s of each."""
    encoders = {mode: task.encoder(mode) for mode in MODES}
    works = [task.bare(encoders["exact"])]
    works += [task.end_to_end(encoders[mode]) for mode in MODES]
    bare, *whole = in_turns(works, rounds)
    make = partial(figure_of, direction="min", module=module, device=task.device.type)
    figures = []
    for mode, seconds in zip(MODES, whole, strict=True):
        ratios = [alone / each for alone, each in zip(bare, seconds, strict=True)]
        title = f"{name} extraction end to end / bare encoder, {mode}"
        figures.append(make(title, ratios, unit="ratio of images/s", goal=goal))
        if task.device.type == "cuda":
            rates = [task.images / each for each in seconds]
            title = f"{name} extraction end to end, {mode}"
            figures.append(make(title, rates, unit="images/s", goal=2500.0))
    return figures


def measure(images: int = 96, rounds: int = 4, batch_size: int = 16) -> list[Figure]:
    """Return the ratios of the speeds, 1 being an encoder that never waits."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_dinov2(folder / "dino", **SMALL)
        task = Task(folder, model, torch.device("cpu"), images, images, batch_size)
        return ratio_figures(task, "DINOv2-S", goal=0.92, rounds=rounds, module="extraction")


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
