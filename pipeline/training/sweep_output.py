"""The table and the picture of a sweep, both made of what its JSON holds."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from features.partial import appearing
from pipeline.tables import rendered

CHOSEN = "heldout/recall@10"
SHOWN = ("top1", "recall@10")  # ends of the names of what an evaluation adds to the picture
PANELS = 6


def sweep_table(document: dict[str, Any]) -> str:
    """Return what `sail sweep` prints: mean ± sd over the seeds, in per cent."""
    table = Table()
    for setting in [*document["over"], "measure"]:
        table.add_column(setting, overflow="fold")
    table.add_column("% (mean ± sd)", justify="right", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    for row in document["summary"]:
        settings = list(row["settings"].values())
        for name, score in row["scores"].items():
            spread = "" if score["sd"] is None else f" ± {100 * score['sd']:.1f}"
            table.add_row(*settings, name, f"{100 * score['mean']:.1f}{spread}", str(score["n"]))
        if row["failed"]:
            table.add_row(*settings, "failed; see `runs` in the JSON", "–", str(row["failed"]))
    return rendered(table)


def sweep_plot(document: dict[str, Any], path: Path) -> None:
    """Draw the scores: over a number, if one alone is varied, and else one bar per combination."""
    rows = [row for row in document["summary"] if row["scores"]]
    names = list(rows[0]["scores"])
    panels = [CHOSEN, *(n for n in names if n.endswith(SHOWN) and not n.startswith("heldout"))]
    panels = panels[:PANELS]
    numbers = _numbers(document["over"])
    height = 3.2 if numbers else 1.2 + 0.35 * len(rows)
    figure = Figure(figsize=(5.5, height * len(panels)), layout="constrained")
    for number, name in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, number)
        if numbers:
            _over_a_number(axes, rows, name, next(iter(document["over"])))
        else:
            _by_combination(axes, rows, name)
    with appearing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _numbers(over: dict[str, list[str]]) -> bool:
    """Whether one setting alone is varied, over positive numbers."""
    if len(over) != 1:
        return False
    (values,) = over.values()
    try:
        return all(float(value) > 0 for value in values)
    except ValueError:
        return False


def _over_a_number(axes: Axes, rows: list[dict[str, Any]], name: str, setting: str) -> None:
    points = [(float(row["settings"][setting]), row["scores"][name]) for row in rows]
    points.sort(key=lambda point: point[0])  # 0.1 and 1e-1 are two settings in one place
    x = [value for value, _ in points]
    means, spreads = _percent([score for _, score in points])
    axes.errorbar(x, means, yerr=spreads, marker="o", capsize=3)
    axes.set_xscale("log")
    axes.set_xlabel("image–text pairs" if setting == "align.rows" else setting)
    axes.set_ylabel(f"{name}, %")
    axes.grid(alpha=0.3)


def _by_combination(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    means, spreads = _percent([row["scores"][name] for row in rows])
    labels = [
        ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row["settings"].items())
        for row in rows
    ]
    axes.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", capsize=3)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"{name}, %")
    axes.grid(axis="x", alpha=0.3)


def _percent(scores: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [100 * s["mean"] for s in scores], [100 * (s["sd"] or 0.0) for s in scores]
