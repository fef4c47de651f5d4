"""Seconds of the demo: all of it once, and its evaluation, with the start of each process."""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.finished import seconds_of


def measure(overrides: Sequence[str] = (), rounds: int = 3) -> list[Figure]:
    """Return the seconds of extract, align and eval together, and of eval alone.

    Args:
        overrides: Further settings.
        rounds: How often it is evaluated, anew each time.
    """
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        options = [f"--set={each}" for each in (f"run.dir='{run}'", *overrides)]
        command = ["-m", "pipeline.cli"]
        stages = ("extract", "align")
        before = sum(seconds_of(*command, stage, "demo", *options) for stage in stages)
        evaluations = []
        for _ in range(rounds):
            shutil.rmtree(run / "eval", ignore_errors=True)
            evaluations.append(seconds_of(*command, "eval", "demo", *options))
    return [
        _figure("demo, from nothing to its report", [before + evaluations[0]], 360),
        _figure("evaluation of the demo", evaluations, 60),
    ]


def _figure(name: str, values: list[float], goal: float) -> Figure:
    return figure_of(name, values, unit="s", goal=goal, direction="max", module="demo")


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
