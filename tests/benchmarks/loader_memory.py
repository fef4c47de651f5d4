"""Prints by how many bytes a loader made this process grow: STORE, MiB of its budget, steps.

`tests.benchmarks.memory` runs it in a process of its own.
"""

import sys
from pathlib import Path

import torch

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.loader import MIB, Loader, LoaderOptions, Source
from features.store import FeatureStore


def kilobytes(name: str) -> int:
    """Return a line of /proc/self/status: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main(store: str, budget_mb: str, steps: str) -> None:
    """Read batches, as a training does, and print the growth of the process."""
    torch.set_num_threads(1)
    columns = Columns.open(FeatureStore.open(Path(store)), AlignConfig(), "synthetic", "synthetic")
    selection = select_rows(columns, holdout=0.0, holdout_rows=1)
    before = kilobytes("VmRSS")
    loader = Loader(
        [Source(columns, selection.train, selection.text_ok)],
        LoaderOptions(batch_size=4096, memory_bytes=int(budget_mb) * MIB),
    )
    for batch in loader.batches(0, min(int(steps), loader.steps_per_epoch)):
        batch.image[0, 0].item()
    print((kilobytes("VmHWM") - before) * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
