"""Peak memory of `sail align` on a store of 4 GB with a loader budget of 500 MB."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import synthetic_store

RUN_FILE = """
[run]
dir = "{folder}"
[data.train]
kind = "folder"
path = "table.jsonl"
[encoders.image.synthetic]
model = "none"
[encoders.text.synthetic]
model = "none"
[align]
batch_size = 4096
steps = {steps}
memory_mb = 500
holdout = 0.01
head = {{ kind = "linear", dim = 256 }}
"""


def peak_bytes(gigabytes: float, steps: int) -> int:
    """Train some steps in a process of its own and return its greatest resident size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = int(gigabytes * 1e9 / (2 * (1024 + 1024)))
        store = synthetic_store(folder / "made", rows=rows, image_dim=1024, text_dim=1024)
        (folder / "features").mkdir()
        Path(str(store.path)).rename(folder / "features" / "train.zarr")
        run_file = folder / "memory.toml"
        run_file.write_text(RUN_FILE.format(folder=folder, steps=steps))
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "align", str(run_file)],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status != 0:
            raise RuntimeError(f"`sail align {run_file}` failed with status {status}")
        return int(usage.ru_maxrss) * 1024


def measure(gigabytes: float = 4.0, steps: int = 60) -> list[Figure]:
    """Return the peak in GB."""
    peak = peak_bytes(gigabytes, steps) / 1e9
    return [
        figure_of(
            f"peak memory of align, store of {gigabytes:g} GB, budget 500 MB",
            [peak],
            unit="GB",
            goal=2.5,
            direction="max",
            module="memory",
        )
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
