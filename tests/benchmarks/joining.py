"""Peak memory and seconds of an index whose captions are joined from a table of a million rows.

Long and short captions of a CSV, 0.5 kB a row, go to as many samples in tars, by key; a tenth of
the rows is of no sample, and a tenth of the samples has no row.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from features.index import Index
from tests import tiny
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import webdataset_shards
from tests.peak_memory import peak_bytes_of

SAMPLES_PER_SHARD = 5_000
BUILD = """
import sys
from pathlib import Path
from features.index import build_index
from features.sources.webdataset import WebdatasetSource
source = {"kind": "webdataset", "path": sys.argv[1], "captions": sys.argv[2]}
build_index(WebdatasetSource.model_validate(source).open(), Path(sys.argv[3]))
"""


def write_table(path: Path, rows: int) -> None:
    """Write the captions of the second sample and of those behind it, with as many of none."""
    with path.open("w") as file:
        file.write("key,long,short\n")
        for row in range(rows // 10, rows + rows // 10):
            shard, sample = divmod(row, SAMPLES_PER_SHARD)
            text = f"{tiny.caption(row % 1000)} {row}"
            file.write(f'{shard:05d}/{sample:07d},"{f"{text}, and " * 16}","{text}"\n')


def measure(rows: int = 1_000_000, rounds: int = 1) -> list[Figure]:
    """Return the greatest resident size of the process, and how long it took."""
    peaks, seconds = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = webdataset_shards(
            folder / "tars", shards=rows // SAMPLES_PER_SHARD, samples=SAMPLES_PER_SHARD
        )
        write_table(folder / "captions.csv", rows)
        for _ in range(rounds):
            started = time.perf_counter()
            index = folder / "index.parquet"
            peak, _ = peak_bytes_of(["-c", BUILD, shards, str(folder / "captions.csv"), str(index)])
            peaks.append(peak / 1e6)
            seconds.append(time.perf_counter() - started)
        counts = Index.open(index).counts
        unmatched = [
            count for what, count in counts.items() if "row in" in what or "no sam" in what
        ]
        if unmatched != [rows // 10] * 2:
            raise ValueError(f"{rows // 10} unmatched on both sides were expected: {counts}")
    return [
        figure_of(
            f"peak memory of joining {rows:,} captions of a CSV to tars",
            peaks,
            unit="MB",
            goal=600,
            direction="max",
            module="joining",
        ),
        figure_of(
            f"joining {rows:,} captions of a CSV to tars",
            seconds,
            unit="s",
            goal=None,
            direction="max",
            module="joining",
        ),
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
