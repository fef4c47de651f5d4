"""Which class is taken for which."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

MOST_LABELLED = 130
MOST_DRAWN = 260
SIDE = 860
MISTAKES = 12


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


def confusion_matrix(
    labels: Int64[np.ndarray, "images"],
    predicted: Int64[np.ndarray, "images"],
    num_classes: int,
) -> Int64[np.ndarray, "classes classes"]:
    """Count images by their class (row) and the class they were taken for (column)."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


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


def matrix_chart(confusions: Confusions, *, side: int = SIDE) -> dict[str, Any]:
    """Lay the matrix out for the template: a square for each pair that occurs.

    A square is stronger for a larger share of its row. With more classes than can be drawn,
    neighbours are drawn as one.
    """
    shown = _merged(confusions)
    names, size = shown.class_names, len(shown.class_names)
    cell = min(34.0, side / size)
    font = min(12.5, 0.92 * cell)
    is_labelled = size <= MOST_LABELLED
    margin = font * 0.56 * max(map(len, names)) + 12 if is_labelled else 14.0
    totals = shown.matrix.sum(axis=1)
    squares = [
        {
            "kind": "hit" if true == taken else "miss",
            "x": margin + taken * cell,
            "y": margin + true * cell,
            "opacity": 0.12 + 0.88 * (shown.matrix[true, taken] / totals[true]) ** 0.7,
            "title": f"{names[true]} → {names[taken]}: {shown.matrix[true, taken]} of "
            f"{totals[true]}",
        }
        for true, taken in np.argwhere(shown.matrix).tolist()
    ]
    return {
        "dataset": confusions.dataset,
        "names": names if is_labelled else (),
        "cell": cell,
        "font": font,
        "margin": margin,
        "extent": size * cell,
        "total": margin + size * cell + 4,
        "least": 12 * size,
        "squares": squares,
    }


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


def confusion_view(confusions: Confusions) -> dict[str, Any]:
    """Return what the template shows of a matrix."""
    return {
        "confusions": confusions,
        "chart": matrix_chart(confusions),
        "attributes": [matrix_chart(each, side=380) for each in by_attribute(confusions)],
        "mistakes": worst_mistakes(confusions, MISTAKES),
        "hardest": hardest_classes(confusions, MISTAKES),
    }
