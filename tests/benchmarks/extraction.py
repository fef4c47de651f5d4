"""Stage one end to end against the bare encoder fed with decoded tensors, in one run.

DINOv2-S architecture with random weights, 224-pixel JPEGs in a tar. The two are measured in turn,
so that a change of the machine's speed meets both.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from features.column_group import ColumnGroup
from features.config import ImageEncoderConfig, WebdatasetSource
from features.encoders import ImageEncoder, load_image_encoder
from features.extract import Run
from features.extract_images import extract_images
from features.images import decode
from features.index import Index, SampleReader
from features.store import FeatureStore
from pipeline.memory import keep_freed_memory
from tests import tiny
from tests.benchmarks.figure import Figure, figure_of

PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}


def dinov2_small(folder: Path) -> Path:
    """Write a DINOv2-S of random weights in Hugging Face layout."""
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def photographs(count: int) -> list[tuple[str, bytes]]:
    """Make JPEGs of 320 × 240 with as much detail as a photograph has (about 20 kB each)."""
    members = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        image = coarse.resize((320, 240), Image.Resampling.BICUBIC)
        members += [
            (f"{seed:06d}.jpg", tiny.encoded(image)),
            (f"{seed:06d}.txt", tiny.caption(seed).encode()),
        ]
    return members


def seconds_of_bare_encoder(encoder: ImageEncoder, batches: list[torch.Tensor]) -> float:
    """Time the encoder alone on pixels that are already decoded."""
    started = time.perf_counter()
    for batch in batches:
        encoder.encode(batch)[0].half().cpu().numpy()
    return time.perf_counter() - started


def measure(images: int = 96, rounds: int = 3, batch_size: int = 16) -> list[Figure]:
    """Return the ratio of the two speeds, 1 being an encoder that never waits."""
    keep_freed_memory()
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tar = tiny.write_tar(folder / "photographs.tar", photographs(images))
        index = Index.build(
            WebdatasetSource(kind="webdataset", path=str(tar)), folder / "index.parquet"
        )
        encoder = load_image_encoder(
            "dinov2-small",
            ImageEncoderConfig(model=str(dinov2_small(folder / "dino")), batch_size=batch_size),
            torch.device("cpu"),
        )
        reader = SampleReader(index)
        pixels = [
            encoder.preprocessing.apply(decode(data or b"", max_pixels=10**8))
            for data in reader.read(0, images)
        ]
        batches = [
            torch.from_numpy(np.stack(pixels[start : start + batch_size]))
            for start in range(0, images, batch_size)
        ]
        encoder.encode(batches[0])  # warm
        for number in range(rounds):
            bare = seconds_of_bare_encoder(encoder, batches)
            store = FeatureStore.create(folder / f"{number}.zarr", index, rows_per_chunk=64)
            made = encoder.columns[0]
            store.add_encoder("image/dinov2-small", made.fingerprint, dim=made.dim)
            started = time.perf_counter()
            run = Run(workers=2, max_pixels=10**8)
            extract_images(ColumnGroup.open(store, ["image/dinov2-small"]), index, encoder, run)
            ratios.append(bare / (time.perf_counter() - started))
    return [
        figure_of(
            "extraction end to end / bare encoder",
            ratios,
            unit="ratio of images/s",
            goal=0.92,
            direction="min",
            module="extraction",
        )
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
