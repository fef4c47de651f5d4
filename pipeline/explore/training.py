"""The curves of a training, also of one that is under way."""

import time
from math import isfinite
from typing import Any

from pipeline.explore.session import Session
from pipeline.run.evaluate import read_metrics

LIVE_SECONDS = 20
MOST_POINTS = 1500


def training_facts(session: Session, seen: int = 0) -> dict[str, Any]:
    """Return the curves of `align/metrics.jsonl`.

    Args:
        session: The run.
        seen: Bytes that the file had when it was last asked for; nothing is read again where it
            has as many.
    """
    path = session.folder.align / "metrics.jsonl"
    found = path.stat() if path.is_file() else None
    size = found.st_size if found else 0
    facts: dict[str, Any] = {
        "bytes": size,
        "live": found is not None and time.time() - found.st_mtime < LIVE_SECONDS,
        "best_step": _best_step(session),
        "epochs": session.config.align.epochs,
    }
    if size and size == seen:
        return facts
    lines = read_metrics(path)
    last = lines[-1] if lines else {}
    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "epoch"))
    return facts | {
        "step": last.get("step"),
        "epoch": last.get("epoch"),
        "curves": {name: _curve(lines, name) for name in names},
    }


def _curve(lines: list[dict[str, Any]], name: str) -> dict[str, list[float | None]]:
    """Return a curve of at most `MOST_POINTS`, its last among them; None where it is not finite."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    every = -(-len(points) // MOST_POINTS)
    kept = points[::-1][::every][::-1]
    return {
        "step": [step for step, _ in kept],
        "value": [value if isfinite(value) else None for _, value in kept],
    }


def _best_step(session: Session) -> int | None:
    checkpoint = session.checkpoint()
    if checkpoint is None:
        return None
    return int(checkpoint.metadata.get("best_step") or checkpoint.step)
