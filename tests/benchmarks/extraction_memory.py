"""Peak memory of `sail extract` against the number of rows, and against captions of a megabyte.

Each size is a process of its own with small real encoders, from tars to a finished store; the peak
is what the operating system says of it when it ends.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import tiny
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import webdataset_shards
from tests.peak_memory import peak_bytes_of

SAMPLES_PER_SHARD = 5_000
ROWS_PER_OUTLIER = 2_500
OUTLIER_BYTES = 1_000_000  # 1 MiB is kept of a text
RUN_FILE = """
[run]
dir = "{run}"
threads = 1
device = "cpu"
[data.train]
kind = "webdataset"
path = {shards}
[encoders.image.vit]
model = "vit"
batch_size = 256
[encoders.text.bert]
model = "bert"
max_length = 32
[extract]
workers = 2
rows_per_chunk = 1024
"""


def peak_bytes(folder: Path, name: str, shards: Sequence[str]) -> int:
    """Extract in a process of its own and return its greatest resident size."""
    run_file = folder / f"{name}.toml"
    run_file.write_text(RUN_FILE.format(run=folder / name, shards=json.dumps(list(shards))))
    peak, _ = peak_bytes_of(["-m", "pipeline.cli", "extract", str(run_file)])
    shutil.rmtree(folder / name)
    return peak


def shard_with_outliers(folder: Path) -> str:
    """Write a tar in which a few captions are nearly a megabyte; return its path."""
    jpeg = tiny.encoded(tiny.picture(0, 8, 8))
    members = []
    for sample in range(SAMPLES_PER_SHARD):
        caption = f"{tiny.caption(sample % 1000)} {sample} "
        if sample % ROWS_PER_OUTLIER == 0:
            caption = (caption * (OUTLIER_BYTES // 20))[:OUTLIER_BYTES]
        members += [
            (f"{sample:07d}.jpg", jpeg),
            (f"{sample:07d}.json", json.dumps({"caption": caption}).encode()),
        ]
    return str(tiny.write_tar(folder / "outliers.tar", members))


def measure(few: int = 10_000, many: int = 200_000, rounds: int = 2) -> list[Figure]:
    """Return the ratio of two peaks: many rows by few, and with outliers by without."""
    by_rows, by_length = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.image_encoder(folder / "vit")
        tiny.text_encoder(folder / "bert")
        shards = many // SAMPLES_PER_SHARD
        webdataset_shards(folder / "shards", shards=shards, samples=SAMPLES_PER_SHARD)
        files = [str(path) for path in sorted((folder / "shards").iterdir())]
        first = files[: few // SAMPLES_PER_SHARD]
        for _ in range(rounds):
            least = peak_bytes(folder, "few", first)
            by_rows.append(peak_bytes(folder, "many", files) / least)
            with_outliers = [*first[1:], shard_with_outliers(folder)]
            by_length.append(peak_bytes(folder, "long", with_outliers) / least)
    return [
        figure_of(
            f"peak memory of extract, {many:,} rows / {few:,} rows",
            by_rows,
            unit="ratio of bytes",
            goal=1.05,
            direction="max",
            module="extraction_memory",
        ),
        figure_of(
            f"peak memory of extract, one caption of a megabyte in {ROWS_PER_OUTLIER:,} / none",
            by_length,
            unit="ratio of bytes",
            goal=1.05,
            direction="max",
            module="extraction_memory",
        ),
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
