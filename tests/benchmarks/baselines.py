"""The demo's scores beside the same head on raw pixels and on random weights, three seeds each.

Adds the two baselines as columns to the demo's stores (`make demo` first), trains the demo's head
on each encoder for as many steps, and writes what the demo's report shows as recorded earlier.
"""

import datetime
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from pipeline.interrupt import StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.cpu import keep_freed_memory
from pipeline.run.evaluate import evaluate_run
from pipeline.run.extract import extract
from tests.benchmarks.figure import machine

OUTPUT = Path(__file__).parents[2] / "pipeline" / "recipes" / "demo-baselines.json"
ENCODERS = {"scenes": None, "pixels": "baseline:pixels", "random-vit": "baseline:random-vit"}
POOLING = {"pixels": "pooler", "random-vit": "mean+max"}
SEEDS = (0, 1, 2)
SHOWN = [
    ("zero_shot", "test", "top1"),
    ("zero_shot", "test/seen classes", "top1"),
    ("zero_shot", "test/unseen classes", "top1"),
    ("retrieval/image_to_text", "test", "recall@10"),
    ("retrieval/text_to_image", "test", "recall@10"),
    ("compositional", "compositional/long", "text_score"),
    ("compositional", "compositional/long", "image_score"),
    ("compositional", "compositional/long", "group_score"),
    ("knn/image_features", "test", "knn_top1"),
]


def settings() -> list[str]:
    """Overrides that add the baselines to the demo."""
    added = []
    for name, model in ENCODERS.items():
        if model:
            added += [
                f"encoders.image.{name}.model='{model}'",
                f"encoders.image.{name}.pooling='{POOLING[name]}'",
            ]
    return added


def scores(
    encoder: str, seed: int, features: Path, folder: Path
) -> dict[tuple[str, str, str], float]:
    """Train one head and evaluate it; scores by task, dataset and metric."""
    config = load_config(
        "demo",
        [
            *settings(),
            f"align.image='{encoder}'",
            f"run.seed={seed}",
            f"run.dir='{folder / f'{encoder}-{seed}'}'",
            f"run.features='{features}'",
            "eval.bootstrap=0",
            "eval.knn_k=[20]",
            "eval.segmentation={}",  # raw pixels have no patches
        ],
    )
    align_run(config, StopRequest())
    results = json.loads(Path(evaluate_run(config, StopRequest())).read_text())["results"]
    return {
        (row["task"], row["dataset"], row["metric"]): row["value"]
        for row in results
        if row["encoders"]["image"] == encoder
    }


def main() -> None:
    """Measure, print a table, and write the file that the report shows."""
    keep_freed_memory()
    demo = load_config("demo", settings())
    extract(demo, StopRequest())
    values: dict[tuple[str, tuple[str, str, str]], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for encoder in ENCODERS:
            for seed in SEEDS:
                found = scores(encoder, seed, demo.run.dir, Path(folder))
                for which in SHOWN:
                    values[encoder, which].append(found[which])
                print(encoder, seed, {"/".join(k): round(found[k], 3) for k in SHOWN}, flush=True)
    rows = []
    for which in SHOWN:
        each = {encoder: values[encoder, which] for encoder in ENCODERS}
        cells = {
            encoder: f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"
            for encoder, found in each.items()
        }
        rows.append({"measure": " ".join(which)} | cells)
    about = f"mean ± sd of {len(SEEDS)} seeds, {machine()}, {datetime.date.today().isoformat()}"
    rows.append({"measure": about} | dict.fromkeys(ENCODERS, ""))
    OUTPUT.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
