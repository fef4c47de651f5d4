"""Curves of the report: drawn by matplotlib, coloured by the page so that they follow its theme."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, PercentFormatter, StrMethodFormatter

MAX_POINTS = 400
LOG_SPAN = 30.0
DOTTED = 40  # a curve of so few points shows each
COLOURS = [f"#00000{number}" for number in range(1, 7)]
SOFT, LINE = "#00000e", "#00000f"
PAGE = {colour: f"var(--s{number})" for number, colour in enumerate(COLOURS)}
PAGE |= {SOFT: "var(--soft)", LINE: "var(--line)"}
"""Stand-ins for the colours of the style sheet, which replace them once the picture is written."""
STYLE: dict[Any, Any] = {
    "figure.figsize": (7.8, 4.2),
    "figure.constrained_layout.use": True,
    "font.size": 11.5,
    "svg.fonttype": "none",
    "axes.prop_cycle": f"cycler(color={COLOURS})",
    "lines.linewidth": 2.2,
    "lines.markersize": 4.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), SOFT),
    **dict.fromkeys(("xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "ytick.minor.size"), 0),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    mark: float | None = None,
) -> Markup:
    """Draw curves over one pair of axes, as SVG to stand in a page.

    Args:
        curves: At least one, with at least one finite point; at most six.
        x_label: What the horizontal axis is.
        y_label: What the vertical axis is.
        percent: The values are fractions; the axis begins at 0.
        mark: Where to draw a vertical line; none if not given.
    """
    drawn = [_thinned(curve) for curve in curves]
    values = [value for curve in drawn for value in curve.y]
    if not values:
        return Markup("")
    label = f"{y_label} over {x_label}"
    with rc_context(STYLE | {"svg.hashsalt": label}):
        figure = Figure()
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        for curve in drawn:
            axes.plot(curve.x, curve.y, marker="o" if len(curve.x) <= DOTTED else None)
        if mark is not None:
            axes.axvline(mark, color=SOFT, linewidth=1, linestyle=(0, (3, 4)))
            place = axes.get_xaxis_transform()
            axes.text(mark, 0.03, "best\u2002", ha="right", transform=place)
        _scale_values(axes, min(values), max(values), percent=percent)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.4g}"))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(buffer.getvalue(), label) + _legend(drawn)


def _scale_values(axes: Axes, low: float, high: float, *, percent: bool) -> None:
    if percent:
        axes.set_ylim(0, min(1.0, 1.1 * high) or 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    elif low > 0 and high / low > LOG_SPAN:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
    elif low >= 0:
        axes.set_ylim(0, 1.05 * high or 1.0)


def _embedded(svg: str, label: str) -> Markup:
    """Return a picture as an element of the page, which has the font, the width and the colours."""
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Ids of groups are the same in every chart.
    svg = re.sub(r'font-family: [^;"]*; | (width|height)="[\d.]+pt"|(?<=<g) id="[^"]*"', "", svg)
    for stand_in, colour in PAGE.items():
        svg = svg.replace(stand_in, colour)
    about = f'<svg class="chart" role="img" aria-label="{escape(label)}" '
    return Markup(svg.replace("<svg ", about, 1))


def _legend(curves: Sequence[Curve]) -> Markup:
    if len(curves) < 2:
        return Markup("")
    entry = Markup('<span><i class="s{}"></i>{}</span>')
    entries = Markup("").join(entry.format(i, curve.name) for i, curve in enumerate(curves))
    return Markup('<p class="legend">{}</p>').format(entries)


def _thinned(curve: Curve) -> Curve:
    """Drop points that are no numbers, and all but a few hundred of a long curve."""
    points = [(a, b) for a, b in zip(curve.x, curve.y, strict=True) if math.isfinite(a + b)]
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = points[::step]
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return Curve(curve.name, [a for a, _ in kept], [b for _, b in kept])
