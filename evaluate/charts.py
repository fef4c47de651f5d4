"""Charts of the report as inline SVG, coloured by its style sheet so that they follow the theme."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from PIL import Image

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
MAX_POINTS = 400
LOG_SPAN = 30.0


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class _Scale:
    """A map from numbers to pixels, and the ticks on it."""

    low: float
    high: float
    start: int
    stop: int
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._linear(each) for each in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        """Round numbers within the scale."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            powers = [10.0**power for power in range(first, last + 1)]
            fine = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
            return powers if len(powers) > 2 else [t for t in fine if self.low <= t <= self.high]
        step = _nice_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _linear(self, value: float) -> float:
        return math.log10(value) if self.log else value


def line_chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    mark: float | None = None,
) -> Markup:
    """Draw curves over one pair of axes.

    Args:
        curves: At least one, with at least one finite point.
        x_label: What the horizontal axis is.
        y_label: What the vertical axis is.
        percent: The values are fractions; the axis begins at 0.
        mark: Where to draw a vertical line; none if not given.
    """
    drawn = [_thinned(curve) for curve in curves]
    xs = [value for curve in drawn for value in curve.x]
    ys = [value for curve in drawn for value in curve.y]
    if not xs:
        return Markup("")
    x = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y = _vertical_scale(ys, percent=percent)
    parts = [_axes(x, y, x_label, y_label, percent=percent)]
    if mark is not None and x.low <= mark <= x.high:
        parts.append(
            f'<line class="mark" x1="{x(mark)}" x2="{x(mark)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{x(mark) - 5}" y="{HEIGHT - BOTTOM - 6}" '
            f'text-anchor="end">best</text>'
        )
    for number, curve in enumerate(drawn):
        points = " ".join(f"{x(a)},{y(b)}" for a, b in zip(curve.x, curve.y, strict=True))
        dots = "".join(
            f'<circle class="s{number}" cx="{x(a)}" cy="{y(b)}" r="2.4"/>'
            for a, b in zip(curve.x, curve.y, strict=True)
            if len(curve.x) <= 40
        )
        parts.append(f'<polyline class="s{number}" points="{points}"/>{dots}')
    label = escape(f"{y_label} over {x_label}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
        + _legend(drawn)
    )


def meter(
    value: float, interval: tuple[float, float] | None = None, chance: float | None = None
) -> Markup:
    """Draw a fraction as a bar, its interval as a whisker and chance as a tick."""
    parts = [
        '<rect class="track" width="100" height="8" rx="1.5"/>',
        f'<rect class="fill" width="{100 * value:.2f}" height="8" rx="1.5"/>',
    ]
    if interval is not None:
        low, high = (100 * bound for bound in interval)
        width = f"{high - low:.2f}"
        parts.append(f'<rect class="whisker" x="{low:.2f}" y="3" width="{width}" height="2"/>')
    if chance is not None:
        parts.append(f'<rect class="chance" x="{100 * chance:.2f}" y="0" width="1.6" height="8"/>')
    return Markup(
        '<svg class="meter" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        + "".join(parts)
        + "</svg>"
    )


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str, *, percent: bool) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks():
        text = f"{100 * tick:.0f} %" if percent else f"{tick:,.4g}"
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 4}" text-anchor="end">{text}</text>'
        )
    parts += [
        f'<text class="tick" x="{x(tick)}" y="{floor + 17}" text-anchor="middle">{tick:,.4g}</text>'
        for tick in x.ticks()
    ]
    middle = (TOP + floor) / 2
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _vertical_scale(values: Sequence[float], *, percent: bool) -> _Scale:
    low, high = min(values), max(values)
    floor = HEIGHT - BOTTOM
    if percent:
        top = min(1.0, _ceiling(high))
        return _Scale(0.0, top if top > 0 else 1.0, floor, TOP)
    if low > 0 and high / low > LOG_SPAN:
        return _Scale(low, high, floor, TOP, log=True)
    if low >= 0:
        return _Scale(0.0, high * 1.05 if high > 0 else 1.0, floor, TOP)
    return _Scale(low, high, floor, TOP)


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    entries = "".join(
        f'<span><i class="s{number}"></i>{escape(curve.name)}</span>'
        for number, curve in enumerate(curves)
    )
    return f'<p class="legend">{entries}</p>'


def _thinned(curve: Curve) -> Curve:
    """Drop points that are no numbers, and all but a few hundred of a long curve."""
    points = [(a, b) for a, b in zip(curve.x, curve.y, strict=True) if math.isfinite(a + b)]
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = points[::step]
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return Curve(curve.name, [a for a, _ in kept], [b for _, b in kept])


def _ceiling(value: float) -> float:
    step = _nice_step(value / 5) if value > 0 else 0.2
    return step * math.ceil(value / step - 1e-9)


def _nice_step(raw: float) -> float:
    if raw <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next((m for m in (1, 2, 2.5, 5) if m * power >= raw), 10)


SIDE = 168
QUALITY = 80


def thumbnail(image: Image.Image, *, side: int = SIDE) -> str:
    """Return an image as a data URI, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
