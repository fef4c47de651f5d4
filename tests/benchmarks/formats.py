"""Peak memory of `sail convert --to` and `sail import-store` on a store far larger than that."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import synthetic_store
from tests.peak_memory import peak_bytes_of

FORMS = ("hdf5", "parquet", "clip-retrieval")


def peaks(folder: Path, rows: int, dim: int) -> Iterator[tuple[str, float, float]]:
    """Yield each form, and the bytes in memory of writing it and of reading it back."""
    store = synthetic_store(folder / "made", rows=rows, image_dim=dim, text_dim=dim)
    for form in FORMS:
        file, copy = folder / form, folder / "copy.zarr"
        sail = ["-m", "pipeline.cli"]
        out, _ = peak_bytes_of(
            [*sail, "convert", str(store.path), "--to", form, "--out", str(file)]
        )
        back, _ = peak_bytes_of(
            [*sail, "import-store", str(file), "--from", form, "--out", str(copy)]
        )
        shutil.rmtree(copy)
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        yield form, out, back


def measure(rows: int = 1_000_000, dim: int = 1024) -> list[Figure]:
    """Return the peaks in GB."""
    with tempfile.TemporaryDirectory() as name:
        found = list(peaks(Path(name), rows, dim))
    return [
        figure_of(
            f"peak memory of {what}, {rows:,} rows of 2 x {dim}",
            [peak / 1e9],
            unit="GB",
            goal=1.0,
            direction="max",
            module="formats",
        )
        for form, out, back in found
        for what, peak in [(f"convert --to {form}", out), (f"import-store of {form}", back)]
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
