"""Two evaluated runs side by side: `sail compare`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from evaluate.results import Items, Result, read_items, read_results
from evaluate.statistics import paired_interval
from features.errors import EvaluationError
from features.storage.files import appearing
from pipeline.tables import numbers, rendered, words

RESAMPLES, SEED = 2000, 0
FOUND = frozenset(
    {"calibrated", "p_value", "regularisation", "converged"}
    | {"patch", "patch_feature", "resample", "mean", "std", "searched_with", "recall"}
)
"""Of a protocol: what came out, or follows from the encoder, rather than what was asked for."""


@dataclass(frozen=True)
class _Evaluated:
    """What `sail eval` left in a run."""

    dir: Path
    results: dict[str, Result]
    items: dict[str, Items]

    @classmethod
    def read(cls, run: Path) -> "_Evaluated":
        path = run / "eval" / "results.json"
        if not path.is_file():
            raise EvaluationError(
                f"{run} has no eval/results.json. Give the folder of a run (its `run.dir`), after "
                f"`sail eval`."
            )
        found = [result for result in read_results(path) if not result.is_detail]
        results = {result.name: result for result in found}
        return cls(run, results, read_items(path.with_name("items.npz")))


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Compare every number that two runs have both; return what `sail compare --json` prints.

    Where both runs kept what every item scored, the difference has the interval of a paired
    bootstrap over the items. Where one did not, it has none, and says so.

    Args:
        first: Folder of an evaluated run.
        second: Folder of the run that is compared with it; differences are second − first.

    Raises:
        EvaluationError: A run is not evaluated, or both are by different rows or protocols, or
            they have no number in common.
    """
    one, two = _Evaluated.read(first), _Evaluated.read(second)
    common = [name for name in one.results if name in two.results]
    if not common:
        raise EvaluationError(
            f"{first} and {second} have no measure in common. Evaluate both with the same [data] "
            f"and [eval]."
        )
    if faults := [fault for name in common for fault in _differences(name, one, two)]:
        raise EvaluationError(
            f"{first} and {second} cannot be compared: {'; '.join(faults[:4])}"
            f"{f'; and {len(faults) - 4} more' if len(faults) > 4 else ''}. Evaluate both with the "
            f"same [data] and [eval]."
        )
    return {
        "first": str(first),
        "second": str(second),
        "resamples": RESAMPLES,
        "measures": [_compare(name, one, two) for name in common],
        "only_first": [name for name in one.results if name not in two.results],
        "only_second": [name for name in two.results if name not in one.results],
    }


def comparison_table(document: dict[str, Any]) -> str:
    """Return what `sail compare` prints, in per cent; a star where the interval leaves 0 out."""
    right = numbers("first", "second", "difference", "95 %", "n", no_wrap=True)
    table = Table(*words("measure"), *right)
    for row in document["measures"]:
        interval = "not paired"
        if row["ci95"] is not None:
            low, high = row["ci95"]
            star = " *" if low > 0 or high < 0 else "  "
            interval = f"{100 * low:+.1f} … {100 * high:+.1f}{star}"
        table.add_row(
            row["measure"],
            *(_with_interval(row[which]) for which in ("first", "second")),
            f"{100 * row['difference']:+.1f}",
            interval,
            f"{row['n']:,}",
        )
    lines = [f"first: {document['first']}", f"second: {document['second']}", rendered(table)]
    if any(row["ci95"] is None for row in document["measures"]):
        lines.append(
            "not paired: no interval of the difference, only one of each number. Either the "
            "measure is no mean over test items (alignment), or a run was evaluated before these "
            "were kept: evaluate it again."
        )
    lines += [
        f"only in the {which}: {', '.join(document[f'only_{which}'])}"
        for which in ("first", "second")
        if document[f"only_{which}"]
    ]
    return "\n".join(lines)


def comparison_plot(document: dict[str, Any], path: Path) -> None:
    """Draw the differences with their intervals, one line per measure."""
    rows = document["measures"]
    figure = Figure(figsize=(7.5, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        difference = 100 * row["difference"]
        if row["ci95"] is None:
            axes.plot(difference, place, "o", color="tab:gray", fillstyle="none")
        else:
            low, high = (100 * bound for bound in row["ci95"])
            colour = "tab:blue" if low > 0 or high < 0 else "tab:gray"
            axes.plot([low, high], [place, place], color=colour)
            axes.plot(difference, place, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["measure"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("second − first, points\n(95 %, paired; hollow: no interval)")
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _differences(name: str, one: _Evaluated, two: _Evaluated) -> Iterator[str]:
    """Say what differs in how a number was measured."""
    first, second = one.results[name], two.results[name]
    ours, theirs = first.protocol | {"n": first.n}, second.protocol | {"n": second.n}
    for key in sorted(ours.keys() | theirs.keys()):
        if key == "rows_sha256" and not (key in ours and key in theirs):
            continue  # of an evaluation that did not keep it: there is no pairing either
        if key in FOUND or (key == "chance" and "permutations" in ours):  # that of shuffled pairs
            continue
        if ours.get(key) != theirs.get(key):
            yield f"{name} has {key} = {_short(ours.get(key))} and {_short(theirs.get(key))}"


def _compare(name: str, one: _Evaluated, two: _Evaluated) -> dict[str, Any]:
    first, second = one.results[name], two.results[name]
    interval = None
    if "rows_sha256" in first.protocol and name in one.items and name in two.items:
        ours, theirs = one.items[name], two.items[name]
        if len(ours.hits) == len(theirs.hits):
            interval = paired_interval(ours, theirs, resamples=RESAMPLES, seed=SEED)
    return {
        "measure": name,
        "n": first.n,
        "first": {"value": first.value, "ci95": first.ci95, "encoders": first.encoders},
        "second": {"value": second.value, "ci95": second.ci95, "encoders": second.encoders},
        "difference": second.value - first.value,
        "ci95": interval,
        "paired": interval is not None,
    }


def _with_interval(side: dict[str, Any]) -> str:
    if side["ci95"] is None:
        return f"{100 * side['value']:.1f}"
    low, high = side["ci95"]
    return f"{100 * side['value']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
