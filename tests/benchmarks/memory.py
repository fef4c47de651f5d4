"""Peak memory of `sail align`, and of its loader alone, on stores far larger than the budget.

The stores of the loader alone are cheap on disk: all chunks of a column are hard links to one file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from align.windows import MIB
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import linked_store, synthetic_store
from tests.peak_memory import peak_bytes_of

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
        peak, _ = peak_bytes_of(["-m", "pipeline.cli", "align", str(run_file)])
        return peak


def loader_share(gigabytes: float, budget_mb: int = 500, steps: int = 200) -> float:
    """Return the peak memory of a loader in a process of its own, as a fraction of its budget."""
    with tempfile.TemporaryDirectory() as name:
        linked_store(Path(name) / "s.zarr", gigabytes=gigabytes, image_dim=1024, text_dim=4096)
        arguments = [f"{name}/s.zarr", str(budget_mb), str(steps)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.loader_memory", *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
    return float(done.stdout) / (budget_mb * MIB)


def measure(
    gigabytes: float = 4.0, steps: int = 60, stores: tuple[float, ...] = (1.0, 4.0, 16.0)
) -> list[Figure]:
    """Return the peak of the command in GB, and those of the loader against its budget."""
    peak = peak_bytes(gigabytes, steps) / 1e9
    shares = [
        figure_of(
            f"peak memory of the loader / budget of 500 MiB, store of {size:g} GB",
            [loader_share(size)],
            unit="ratio",
            goal=1.1,
            direction="max",
            module="memory",
        )
        for size in stores
    ]
    command = figure_of(
        f"peak memory of align, store of {gigabytes:g} GB, budget 500 MB",
        [peak],
        unit="GB",
        goal=2.5,
        direction="max",
        module="memory",
    )
    return [*shares, command]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
