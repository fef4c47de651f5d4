"""Intersection over union of segmented pixels, over a split and with its interval over pictures."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from evaluate.bootstrap import Interval, percentile_interval
from features.errors import EvaluationError

IGNORED = -1
RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True)
class Areas:
    """Pixels of each picture and class: all that IoU depends on."""

    right: Int64[np.ndarray, "pictures classes"]
    """Of the class, and taken for it."""
    true: Int64[np.ndarray, "pictures classes"]
    """Of the class."""
    taken: Int64[np.ndarray, "pictures classes"]
    """Taken for the class."""

    def iou(self) -> Float[np.ndarray, "classes"]:
        """Return each class's IoU over all pictures, NaN where neither mask nor prediction has it.

        Reference:
            Everingham et al. 2015, The PASCAL Visual Object Classes Challenge: A Retrospective,
            IJCV 111, section 3.2.4: the sums are of the split, it is no mean over pictures.
        """
        return _iou(self.right.sum(axis=0), self.true.sum(axis=0), self.taken.sum(axis=0))

    def random_class(self) -> float:
        """Return the mean IoU to expect when each pixel takes a class at random."""
        true = self.true.sum(axis=0)
        each = true.sum() / len(true)
        return mean_iou(_iou(true / len(true), true, np.full(len(true), each)))

    def majority_class(self) -> float:
        """Return the mean IoU when every pixel takes the most frequent class."""
        true = self.true.sum(axis=0)
        taken = np.where(np.arange(len(true)) == true.argmax(), true.sum(), 0)
        return mean_iou(_iou(np.where(taken > 0, true, 0), true, taken))

    def intervals(
        self, *, resamples: int, seed: int
    ) -> tuple[Interval | None, list[Interval | None]]:
        """Return the 95 % interval of the mean IoU and of each class, pictures drawn anew.

        A class whose pictures all fall out of a resample does not count there: its IoU would be 0
        whenever a pixel elsewhere is taken for it.

        Args:
            resamples: How often the pictures are drawn, with replacement; 0 for no interval.
            seed: Of the drawing.
        """
        pictures, classes = self.right.shape
        if not resamples or not pictures:
            return None, [None] * classes
        generator = np.random.default_rng(seed)
        occurs = self.true.any(axis=0)
        parts = []
        for start in range(0, resamples, RESAMPLES_AT_ONCE):
            count = min(RESAMPLES_AT_ONCE, resamples - start)
            drawn = generator.multinomial(pictures, np.full(pictures, 1 / pictures), size=count)
            true = drawn @ self.true
            iou = _iou(drawn @ self.right, true, drawn @ self.taken)
            iou[(true == 0) & occurs] = np.nan
            parts.append(iou)
        drawn_iou = np.concatenate(parts)
        means = np.array([mean_iou(each) for each in drawn_iou])
        return _interval(means), [_interval(each) for each in drawn_iou.T]


def pixel_confusion(
    labels: Int64[np.ndarray, "*pixels"],
    predicted: Int64[np.ndarray, "*taken"],
    num_classes: int,
) -> Int64[np.ndarray, "classes classes"]:
    """Count pixels by their class (row) and the class they were taken for (column).

    Args:
        labels: Classes below `num_classes`; pixels of -1 are left out.
        predicted: Of the same shape, below `num_classes`.
        num_classes: Classes that are scored.

    Raises:
        EvaluationError: The shapes differ, or a label is no class.
    """
    if labels.shape != predicted.shape:
        raise EvaluationError(
            f"The mask has the shape {labels.shape}, its prediction {predicted.shape}. The same "
            f"shape was expected. Put the mask of the same picture beside it."
        )
    kept = labels != IGNORED
    true, taken = labels[kept], predicted[kept]
    if true.size and not 0 <= true.min() <= true.max() < num_classes:
        wrong = int(true.min() if true.min() < 0 else true.max())
        raise EvaluationError(
            f"The mask has the label {wrong}. Labels from 0 to {num_classes - 1}, or {IGNORED} for "
            f"pixels that do not count, were expected. Correct the list of classes or the mask."
        )
    flat: np.ndarray = np.bincount(true * num_classes + taken, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def mean_iou(iou: Float[np.ndarray, "classes"]) -> float:
    """Return the mean over the classes that occur; NaN where none does."""
    there = iou[np.isfinite(iou)]
    return float(there.mean()) if len(there) else float("nan")


def _iou(right: np.ndarray, true: np.ndarray, taken: np.ndarray) -> np.ndarray:
    union = np.asarray(true + taken - right, dtype=np.float64)
    iou = np.full(union.shape, np.nan)
    np.divide(right, union, out=iou, where=union > 0)
    return iou


def _interval(values: Float[np.ndarray, "resamples"]) -> Interval | None:
    """Return the percentiles of the resamples in which the class occurs."""
    there = values[np.isfinite(values)]
    return percentile_interval(there) if len(there) else None
