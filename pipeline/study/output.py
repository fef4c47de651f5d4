"""The page and the picture of a study, both made of what its JSON holds."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from evaluate.correlation import LEAST_POINTS
from features.partial import appearing
from pipeline.tables import rendered

COLUMNS = 4


def study_table(document: dict[str, Any]) -> str:
    """Return what `sail study` prints: what predicts alignment, the strongest first."""
    if not document["correlations"]:
        return (
            f"Nothing can be correlated: that needs {LEAST_POINTS} encoders, or pairs of them, "
            f"that differ; there are {len(document['pairs'])} pairs. The page ranks them."
        )
    table = Table()
    for heading in ("measure", "over"):
        table.add_column(heading, overflow="fold")
    for heading in ("n", "Pearson (95 %)", "without one", "Spearman (95 %)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["correlations"]:
        table.add_row(row["measure"], row["over"], *_correlation(row))
    return rendered(table)


def study_page(document: dict[str, Any]) -> str:
    """Return study.md: correlations, encoders, and the ranking of the pairs."""
    lines = [
        "# What predicts alignment",
        "",
        f"Alignment: mean of both recalls@10 that a linear probe reaches, over "
        f"{document['images']} images ({document['scored_on']}).",
        "",
        "![Alignment over every measure](study.png)",
        "",
        *_markdown(
            ("measure", "over", "n", "Pearson (95 %)", "without one", "Spearman (95 %)"),
            [[row["measure"], row["over"], *_correlation(row)] for row in document["correlations"]],
        ),
    ]
    if document["encoders"]:
        names = list(next(iter(document["encoders"].values())))
        rows = [
            [
                encoder,
                *(_measured(found[n], "{:.1f}", 100) for n in names),
            ]
            for encoder, found in document["encoders"].items()
        ]
        lines += [
            "",
            *_markdown(("image encoder", *(f"{name}, % (95 %, time)" for name in names)), rows),
        ]
    names = list(document["pairs"][0]["measures"])
    rows = [
        [
            pair["image"],
            pair["text"],
            f"{100 * pair['recall@10']:.1f} ({_per_cent(pair['ci95'])})",
            f"{pair['probability_best']:.2f}",
            f"{pair['seconds']:.1f}",
            *(_measured(pair["measures"][n], "{:.3f}") for n in names),
        ]
        for pair in document["pairs"]
    ]
    measures = [f"{name} (95 %, time)" for name in names]
    headings = ("image", "text", "recall@10, % (95 %)", "P(best)", "training, s", *measures)
    return "\n".join([*lines, "", *_markdown(headings, rows), ""])


def study_plot(document: dict[str, Any], path: Path) -> None:
    """Draw alignment over every measure."""
    rows = document["correlations"]
    height = -(-max(len(rows), 1) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.8 * height), layout="constrained")
    for number, row in enumerate(rows, 1):
        axes = figure.add_subplot(height, COLUMNS, number)
        x, y = zip(*row["points"], strict=True)
        axes.scatter(x, [100 * value for value in y], s=14)
        axes.set_title(f"r = {row['pearson']:.2f}, n = {row['n']}", fontsize=9)
        axes.set_xlabel(f"{row['measure']}, {row['over']}", fontsize=8)
        axes.set_ylabel("recall@10, %", fontsize=8)
        axes.grid(alpha=0.3)
    with appearing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _correlation(row: dict[str, Any]) -> list[str]:
    spearman = f"{row['spearman']:.2f}"
    if row["spearman_interval"] is not None:
        spearman += " ({:.2f} … {:.2f})".format(*row["spearman_interval"])
    return [
        str(row["n"]),
        "{:.2f} ({:.2f} … {:.2f})".format(row["pearson"], *row["pearson_interval"]),
        f"{min(row['without_one']):.2f} … {max(row['without_one']):.2f}",
        spearman,
    ]


def _measured(found: dict[str, Any], form: str, scale: float = 1) -> str:
    """Return a value with its interval and its seconds."""
    doubt = "–".join(form.format(scale * edge) for edge in found["ci95"] or ())
    inside = [*filter(None, [doubt]), f"{found['seconds']:.1f} s"]
    return f"{form.format(scale * found['value'])} ({', '.join(inside)})"


def _per_cent(interval: list[float]) -> str:
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"


def _markdown(headings: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
