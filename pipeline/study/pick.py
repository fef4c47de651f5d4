"""Which pair of encoders to take, before all of the data are encoded: `sail pick`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from evaluate.bootstrap import percentile_interval
from features.storage.files import write
from pipeline.config import load_config
from pipeline.interrupt import StopRequest
from pipeline.study.probes import Probe, draws, probe_folder, probe_pairs
from pipeline.tables import rendered

RESAMPLES, SEED = 2000, 0


def pick_run(
    recipe: str, overrides: Sequence[str], on: str | None, stop: StopRequest
) -> tuple[Path, dict[str, Any]]:
    """Probe every pair, and say which is the best and how sure that is; return pick.json and it.

    Args:
        recipe: The run file, whose features are there.
        overrides: Settings over it.
        on: Split to score on; the held-out rows of the training split if not given.
        stop: Whether to stop.

    Raises:
        Stopped: A signal came; the same call goes on from here.
    """
    config = load_config(recipe, overrides)
    rows, probes = probe_pairs(recipe, overrides, on, stop)
    document = {
        "schema": 1,
        "scored_on": on or f"held-out rows of {config.align.split}",
        "images": len(rows.rows),
        "resamples": RESAMPLES,
        "pairs": ranking(probes),
    }
    path = probe_folder(config) / "pick.json"
    write(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return path, document


def ranking(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """Rank pairs by recall@10, each with its interval and how probably it is the best of all.

    All pairs are scored on the same draws of the images, so that images that are hard for all do
    not blur the order. Pairs that are equally good in a draw share it.
    """
    drawn = draws(len(probes[0].items["image_to_text"].hits), resamples=RESAMPLES, seed=SEED)
    recalls = np.stack([probe.recall(drawn) for probe in probes])  # (pairs, resamples)
    is_best = recalls == recalls.max(axis=0)
    shares = (is_best / is_best.sum(axis=0)).mean(axis=1)
    rows = [
        {
            "image": probe.image,
            "text": probe.text,
            "recall@10": float(probe.recall()[0]),
            "ci95": list(percentile_interval(of_probe)),
            "probability_best": float(share),
            "seconds": probe.seconds,
        }
        for probe, of_probe, share in zip(probes, recalls, shares, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["recall@10"])


def pick_table(document: dict[str, Any]) -> str:
    """Return what `sail pick` prints."""
    table = Table()
    for heading in ("image", "text"):
        table.add_column(heading, overflow="fold")
    for heading in ("recall@10, %", "95 %", "best with probability"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["pairs"]:
        low, high = row["ci95"]
        table.add_row(
            row["image"],
            row["text"],
            f"{100 * row['recall@10']:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            f"{row['probability_best']:.2f}",
        )
    best = document["pairs"][0]
    doubt = [row for row in document["pairs"][1:] if row["probability_best"] >= 0.05]
    lines = [rendered(table), f"Best: {best['image']} with {best['text']}."]
    if doubt:
        names = ", ".join(f"{row['image']} with {row['text']}" for row in doubt)
        lines.append(f"Not told apart from it by {document['images']:,} images: {names}.")
    return "\n".join(lines)
