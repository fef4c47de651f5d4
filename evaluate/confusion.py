"""The confusion matrix of the report: readable with a hundred classes, and in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from markupsafe import Markup, escape

MOST_LABELLED = 130
MOST_DRAWN = 260
SIDE = 860


@dataclass(frozen=True)
class Confusions:
    """Which class was taken for which."""

    dataset: str
    class_names: tuple[str, ...]
    matrix: Int64[np.ndarray, "classes classes"]
    """Images of the class of the row that were taken for the class of the column."""


@dataclass(frozen=True)
class Mistake:
    """A pair of classes that is confused."""

    true: str
    predicted: str
    count: int
    images: int
    """Images of the true class."""


def worst_mistakes(confusions: Confusions, count: int) -> list[Mistake]:
    """Return the most frequent mistakes, most frequent first."""
    wrong = confusions.matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    names, totals = confusions.class_names, confusions.matrix.sum(axis=1)
    places = [divmod(int(place), len(names)) for place in order]
    return [
        Mistake(names[true], names[taken], int(wrong[true, taken]), int(totals[true]))
        for true, taken in places
        if wrong[true, taken]
    ]


def hardest_classes(confusions: Confusions, count: int) -> list[tuple[str, int, int]]:
    """Return the name, right and all images of the classes of the lowest recall."""
    totals, right = confusions.matrix.sum(axis=1), np.diag(confusions.matrix)
    share = np.where(totals > 0, right / np.maximum(totals, 1), 2.0)
    order = np.lexsort((-totals, share))[:count]
    return [(confusions.class_names[i], int(right[i]), int(totals[i])) for i in order if totals[i]]


def by_attribute(confusions: Confusions) -> list[Confusions]:
    """Sum the matrix over each word of the class names, where these are a grid of two words.

    `red circle`, `red square`, `blue circle`, `blue square` give a matrix of colours and one of
    shapes. Other class names give nothing.
    """
    words = [name.split() for name in confusions.class_names]
    if len(words) < 4 or any(len(pair) != 2 for pair in words):
        return []
    matrices = []
    for position in range(2):
        values = list(dict.fromkeys(pair[position] for pair in words))
        number = np.array([values.index(pair[position]) for pair in words])
        summed = np.zeros((len(values), len(values)), dtype=np.int64)
        np.add.at(summed, (number[:, None], number[None, :]), confusions.matrix)
        which = ("first", "last")[position]
        matrices.append(Confusions(f"{confusions.dataset}, {which} word", tuple(values), summed))
    is_grid = len(matrices[0].class_names) * len(matrices[1].class_names) == len(words)
    return matrices if is_grid and all(len(m.class_names) > 1 for m in matrices) else []


def matrix_chart(confusions: Confusions, *, side: int = SIDE) -> Markup:
    """Draw the matrix: a square for each pair that occurs, stronger for a larger share of its row.

    With more classes than can be drawn, neighbours are drawn as one.
    """
    shown = _merged(confusions)
    size = len(shown.class_names)
    labelled = size <= MOST_LABELLED
    cell = min(34.0, side / size)
    font = min(12.5, 0.92 * cell)
    longest = max(len(name) for name in shown.class_names)
    margin = font * 0.56 * longest + 12 if labelled else 14.0
    extent = size * cell
    parts = [
        f'<rect class="track" x="{margin:.1f}" y="{margin:.1f}" width="{extent:.1f}" '
        f'height="{extent:.1f}"/>'
    ]
    parts += _cells(shown, cell, margin)
    if labelled:
        parts += _labels(shown.class_names, cell, margin, font)
    total = margin + extent + 4
    return Markup(
        f'<div class="scroll"><svg class="matrix" viewBox="0 0 {total:.0f} {total:.0f}" '
        f'style="max-width:{total:.0f}px;min-width:{min(total, 12 * size):.0f}px" role="img" '
        f'aria-label="confusion matrix of {escape(confusions.dataset)}">'
        + "".join(parts)
        + "</svg></div>"
    )


def _cells(shown: Confusions, cell: float, margin: float) -> list[str]:
    totals = shown.matrix.sum(axis=1)
    parts = []
    for true, taken in np.argwhere(shown.matrix).tolist():
        count, total = int(shown.matrix[true, taken]), int(totals[true])
        names = shown.class_names
        title = escape(f"{names[true]} → {names[taken]}: {count} of {total}")
        kind = "hit" if true == taken else "miss"
        parts.append(
            f'<rect class="{kind}" x="{margin + taken * cell:.1f}" y="{margin + true * cell:.1f}" '
            f'width="{cell:.1f}" height="{cell:.1f}" '
            f'fill-opacity="{0.12 + 0.88 * (count / total) ** 0.7:.2f}"><title>{title}</title>'
            f"</rect>"
        )
    return parts


def _labels(names: Sequence[str], cell: float, margin: float, font: float) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        middle = margin + (number + 0.5) * cell
        text = escape(name)
        parts.append(
            f'<text x="{margin - 4:.1f}" y="{middle + font * 0.35:.1f}" font-size="{font:.1f}" '
            f'text-anchor="end">{text}</text>'
            f'<text transform="translate({middle + font * 0.35:.1f} {margin - 4:.1f}) rotate(-90)" '
            f'font-size="{font:.1f}">{text}</text>'
        )
    return parts


def _merged(confusions: Confusions) -> Confusions:
    size = len(confusions.class_names)
    each = -(-size // MOST_DRAWN)
    if each == 1:
        return confusions
    starts = np.arange(0, size, each)
    matrix = np.add.reduceat(np.add.reduceat(confusions.matrix, starts, axis=0), starts, axis=1)
    names = confusions.class_names
    merged = tuple(f"{names[i]} … {names[min(i + each, size) - 1]}" for i in range(0, size, each))
    return Confusions(confusions.dataset, merged, matrix)
