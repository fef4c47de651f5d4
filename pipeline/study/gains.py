"""What more pairs would give, and which of two settings is ahead, by a sweep over `align.rows`."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

ROWS = "align.rows"
FITTED = 3
"""Sizes through which the end of a curve is drawn: the largest."""
Curve = dict[int, float]
"""Of one seed, the score at each number of rows."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, in the unit of the score."""

    mean: float
    se: float | None
    """Standard error over the seeds; None of one seed alone."""
    seeds: int

    @classmethod
    def over(cls, values: Sequence[float]) -> "Estimate":
        """Return that of one value per seed."""
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))

    def __str__(self) -> str:
        """Say it in points of a hundred."""
        spread = "" if self.se is None else f" ± {100 * self.se:.1f}"
        return f"{100 * self.mean:.1f}{spread} points"


def gains_of(runs: Sequence[Mapping[str, Any]], measure: str) -> list[str]:
    """Say what the curves over `align.rows` tell, one sentence each; nothing if rows do not vary.

    The gain of as many pairs again as there are is read off a straight line over the logarithm of
    the rows, through the last `FITTED` sizes, of each seed by itself. Two settings are compared by
    their difference at each size with the same seed. Standard errors are over seeds: they tell
    nothing of other photographs, nor of other choices of rows, which are nested.

    Args:
        runs: Of a sweep: `settings`, `seed`, `scores`.
        measure: Name of the score, a fraction.
    """
    curves = _curves(runs, measure)
    told = [
        f"{_named(settings)}with {rows:,} more pairs ({2 * rows:,} in all) {measure} gains {gain}"
        for settings, of_seeds in curves.items()
        for rows, gain in _gain(of_seeds)
    ]
    for (first, ours), (second, theirs) in combinations(curves.items(), 2):
        told += _compared((first, second), (ours, theirs), measure)
    return told


def _curves(runs: Sequence[Mapping[str, Any]], measure: str) -> dict[str, dict[int, Curve]]:
    """Return the curve of every seed, by the other settings of its runs."""
    found: dict[str, dict[int, Curve]] = {}
    for run in runs:
        settings = dict(run["settings"])
        rows, score = settings.pop(ROWS, None), run["scores"].get(measure)
        if rows is None or score is None:
            continue
        curve = found.setdefault(json.dumps(settings), {}).setdefault(run["seed"], {})
        curve[int(rows)] = score
    return found


def _gain(of_seeds: Mapping[int, Curve]) -> Iterator[tuple[int, Estimate]]:
    """Yield the largest number of rows, and what twice as many would give; nothing of one size."""
    largest = max(max(curve) for curve in of_seeds.values())
    slopes = []
    for curve in of_seeds.values():
        sizes = sorted(curve)[-FITTED:]
        if len(sizes) > 1 and sizes[-1] == largest:
            scores = [curve[size] for size in sizes]
            slopes.append(float(np.polyfit(np.log(sizes), scores, 1)[0]))
    if slopes:
        yield largest, Estimate.over([slope * math.log(2) for slope in slopes])


def _compared(
    names: tuple[str, str], curves: tuple[dict[int, Curve], dict[int, Curve]], measure: str
) -> Iterator[str]:
    """Yield which of two settings is ahead, on the runs of the same seed and size."""
    ours, theirs = curves
    of_sizes: dict[int, list[float]] = {}
    of_seeds = []
    for seed in ours.keys() & theirs.keys():
        shared = sorted(ours[seed].keys() & theirs[seed].keys())
        differences = [ours[seed][size] - theirs[seed][size] for size in shared]
        for size, difference in zip(shared, differences, strict=True):
            of_sizes.setdefault(size, []).append(difference)
        if shared:
            of_seeds.append(statistics.fmean(differences))
    if len(of_sizes) < 2:
        return
    ahead = Estimate.over(of_seeds)
    if ahead.mean < 0:
        names, ahead = (names[1], names[0]), Estimate(-ahead.mean, ahead.se, ahead.seeds)
        of_sizes = {size: [-each for each in values] for size, values in of_sizes.items()}
    behind = [size for size, values in sorted(of_sizes.items()) if statistics.fmean(values) <= 0]
    where = (
        f"but not at {', '.join(map('{:,}'.format, behind))} pairs" if behind else "at all sizes"
    )
    first, second = (_named(each).removesuffix(": ") for each in names)
    yield f"{first} is ahead of {second} by {ahead} of {measure} on average, {where}"


def _named(settings: str) -> str:
    """Return the values of settings as they are told apart, with a colon behind them."""
    values = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in json.loads(settings).items())
    return f"{values}: " if values else ""
