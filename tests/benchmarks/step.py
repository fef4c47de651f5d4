"""The share of a training step that waits for data, at the batch and depth of `sail`.

All widths are those of `sail` (1024 and 4096 in, 768 out) divided by 4, so that it takes a
minute on two cores. That asks more of the loader than `sail` does: a step has 16 times fewer
products, but only 4 times fewer bytes.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from align.config import AlignConfig
from align.trainer import train
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import synthetic_store

MIB = 2**20
LEAST_ROWS = 14_336  # two windows of one chunk, and the buffers that chunks are read through


def share_of_waiting(*, rows: int, batch: int, steps: int, scale: int) -> float:
    """Train some steps on a store of which the loader may hold half; the share of all their time.

    The first step is left out: it waits for the first window, once in a training.
    """
    image_dim, text_dim, dim = 1024 // scale, 4096 // scale, 768 // scale
    row_bytes = 2 * (image_dim + text_dim)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = synthetic_store(folder / "made", rows=rows, image_dim=image_dim, text_dim=text_dim)
        config = AlignConfig.model_validate(
            {
                "batch_size": batch,
                "steps": steps,
                "holdout": 0.0,
                "memory_mb": (max(rows // 2, LEAST_ROWS) + batch) * row_bytes // MIB + 1,
                "head": {"kind": "glu", "dim": dim, "depth": 8},
            }
        )
        train(
            [store],
            config,
            image="synthetic",
            text="synthetic",
            run_dir=folder / "run",
            device=torch.device("cpu"),
            seed=0,
        )
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        later = list(lines)[1:]
        waited = sum(line["wait_for_data_seconds"] for line in later)
        seconds = sum(batch / line["images_per_second"] for line in later)
        return float(waited / seconds)


def measure(
    rows: int = 98_304, batch: int = 16_384, steps: int = 9, scale: int = 4
) -> list[Figure]:
    """Return the share."""
    share = share_of_waiting(rows=rows, batch=batch, steps=steps, scale=scale)
    return [
        figure_of(
            f"share of a step that waits for data, batch {batch}, widths of sail / {scale}",
            [share],
            unit="share of time",
            goal=0.05,
            direction="max",
            module="step",
        )
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
