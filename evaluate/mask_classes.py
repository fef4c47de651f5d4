"""The classes of segmentation masks: their names and their values."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from evaluate.segmentation_sets import FOLDER, SEGMENTATION_SETS
from features.errors import EvaluationError
from features.storage import files
from features.storage.place import Place

MOST_VALUES = 1 << 16
UNKNOWN, IGNORED = -2, -1


@dataclass(frozen=True)
class MaskClasses:
    """The classes that pixels can have."""

    names: tuple[tuple[str, ...], ...]
    """Of each class, its names."""
    values: tuple[int, ...]
    """Of each class, its value in the masks."""
    ignored: tuple[int, ...]
    """Values of pixels that do not count."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The first name of each class."""
        return tuple(names[0] for names in self.names)

    def labels(
        self, mask: Integer[np.ndarray, "height width"], place: object
    ) -> Int64[np.ndarray, "height width"]:
        """Turn the values of a mask into classes, -1 where a pixel does not count.

        Args:
            mask: As it was read.
            place: Where it was read, for the message.

        Raises:
            EvaluationError: It has a value that is of no class and not ignored.
        """
        table = np.full(MOST_VALUES + 1, UNKNOWN, dtype=np.int64)
        table[list(self.ignored)] = IGNORED
        table[list(self.values)] = np.arange(len(self.values))
        labels: np.ndarray = table[np.clip(mask, -1, MOST_VALUES)]  # beyond: the last, unknown
        if (labels == UNKNOWN).any():
            unknown = np.unique(mask[labels == UNKNOWN]).tolist()
            raise EvaluationError(
                f"The mask {place} has the value {unknown[0]}, which is of no class. One of the "
                f"{len(self.values)} values from {min(self.values)} to {max(self.values)}, or "
                f"{list(self.ignored)} for pixels that do not count, was expected. Correct "
                f"`classes`, or give masks of this data set."
            )
        return labels


def read_mask_classes(setting: str | Place) -> MaskClasses:
    """Read one of `SEGMENTATION_SETS`, or a JSON file of the user.

    Args:
        setting: The word, or the place of a file `{"classes": […], "values": […], "ignored": […]}`.
            A class is a name or a list of names. Its values are 0, 1, 2, … if not given, and 255
            is ignored.

    Raises:
        EvaluationError: The file cannot be read, or is not of this form.
    """
    place = FOLDER / f"{setting}.json" if setting in SEGMENTATION_SETS else setting
    try:
        document = json.loads(files.read(Path(place) if isinstance(place, str) else place))
        names = tuple(_names(each) for each in document["classes"])
        values = tuple(map(int, document.get("values", range(len(names)))))
        ignored = tuple(map(int, document.get("ignored", [255])))
        _check(names, values, ignored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"The classes {str(setting)!r} cannot be read: {error}. One of "
            f"{', '.join(SEGMENTATION_SETS)}, or a JSON file "
            f'{{"classes": ["sky", ["road", "street"]], "values": [0, 1], "ignored": [255]}} was '
            f"expected. Correct `classes` in [eval.segmentation]."
        ) from error
    return MaskClasses(names, values, ignored)


def _names(entry: Any) -> tuple[str, ...]:
    names = (entry,) if isinstance(entry, str) else tuple(entry)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"a class has the names {entry!r}")
    return names


def _check(names: Sequence[object], values: Sequence[int], ignored: Sequence[int]) -> None:
    if not names or len(names) != len(values):
        raise ValueError(f"there are {len(names)} classes and {len(values)} values")
    every = [*values, *ignored]
    if len(set(every)) != len(every):
        raise ValueError("a value stands twice")
    if not all(0 <= value < MOST_VALUES for value in every):
        raise ValueError(f"values from 0 to {MOST_VALUES - 1} are possible in a mask")
