"""Open-vocabulary segmentation of one picture, and the scores of many."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from evaluate.statistics import Interval, percentile_interval
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


Encode = Callable[
    [Float[Tensor, "windows 3 height width"]], Float[Tensor, "windows rows columns dim"]
]
"""Aligned patch features of standardised windows whose sides are multiples of the patch."""
COSINES_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Sliding:
    """How a picture is cut into windows, in pixels."""

    crop: int = 448
    stride: int = 224
    patch: int = 14
    windows_at_once: int = 16


@dataclass(frozen=True)
class Names:
    """What patches are compared with."""

    embeddings: Float[Tensor, "names dim"]
    """Of any length; normalised here."""
    owners: Int64[Tensor, "names"]
    """The class of each name; several names of one class are synonyms."""


def fit_size(height: int, width: int, *, short: int = 448, longest: int = 2048) -> tuple[int, int]:
    """Return the height and width that keep the ratio: as large as both bounds allow.

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        short: The shorter side is at most this.
        longest: The longer side is at most this.
    """
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def window_starts(extent: int, crop: int, stride: int) -> list[int]:
    """Return where the windows along a side begin; the last one ends at the border.

    Raises:
        EvaluationError: The stride would leave pixels between windows out.
    """
    if not 0 < stride <= crop:
        raise EvaluationError(
            f"The stride of the windows is {stride} pixels and their side is {crop}. A stride of "
            f"1 to {crop} was expected, so that every pixel is seen. Correct the stride."
        )
    last = max(extent - crop, 0)
    return [*range(0, last, stride), last]


@torch.inference_mode()
def segment(
    image: Float[Tensor, "3 height width"],
    encode: Encode,
    names: Names,
    sliding: Sliding,
    size: tuple[int, int],
) -> Int64[Tensor, "mask_height mask_width"]:
    """Return the class of every pixel: that of the nearest name, of equally near ones the first.

    The cosines of the patches of a window are enlarged bilinearly to its pixels; where windows
    overlap, the mean counts; the whole is enlarged bilinearly to the size of the mask. As many
    names are looked at together as fit into 128 MB, which changes nothing.

    Args:
        image: Resized, and standardised with the statistics of the encoder.
        encode: Gives the aligned features of the patches of some windows.
        names: Of the classes.
        sliding: The windows. A window whose sides are no multiples of the patch is padded below
            and to the right with zeros, the mean colour.
        size: Height and width of the mask.

    Raises:
        EvaluationError: A cosine is not a number.
    """
    height, width = image.shape[1:]
    places = list(
        product(
            window_starts(height, sliding.crop, sliding.stride),
            window_starts(width, sliding.crop, sliding.stride),
        )
    )
    cosines = _cosines(image, encode, names, sliding, places)
    step = max(1, COSINES_AT_ONCE // (height * width + size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=image.device)
    taken = torch.zeros(size, dtype=torch.int64, device=image.device)
    for start in range(0, len(names.owners), step):
        whole = _joined(cosines[..., start : start + step], places, (height, width), sliding)
        enlarged = F.interpolate(whole[None], size=size, mode="bilinear", align_corners=False)[0]
        nearest, name = enlarged.max(dim=0)
        taken = torch.where(nearest > best, names.owners[start + name], taken)
        best = torch.maximum(best, nearest)
    return taken


def _cosines(
    image: Float[Tensor, "3 height width"],
    encode: Encode,
    names: Names,
    sliding: Sliding,
    places: list[tuple[int, int]],
) -> Float[Tensor, "windows rows columns names"]:
    """Return the cosine of every patch of every window with every name."""
    text = F.normalize(names.embeddings, dim=-1)
    parts = []
    for start in range(0, len(places), sliding.windows_at_once):
        windows = torch.stack(
            [
                image[:, top : top + sliding.crop, left : left + sliding.crop]
                for top, left in places[start : start + sliding.windows_at_once]
            ]
        )
        right, below = -windows.shape[-1] % sliding.patch, -windows.shape[-2] % sliding.patch
        patches = encode(F.pad(windows, (0, right, 0, below)))
        parts.append(F.normalize(patches, dim=-1) @ text.T)
    cosines = torch.cat(parts)
    if not torch.isfinite(cosines).all():
        raise EvaluationError(
            "The embedding of a patch or of a class name is not a number. Finite embeddings were "
            "expected. Compute in another `precision`, or train the head again."
        )
    return cosines


def _joined(
    cosines: Float[Tensor, "windows rows columns names"],
    places: list[tuple[int, int]],
    size: tuple[int, int],
    sliding: Sliding,
) -> Float[Tensor, "names height width"]:
    """Return the cosine of every pixel with some names, the mean over the windows that see it."""
    total = cosines.new_zeros((cosines.shape[-1], *size))
    seen = cosines.new_zeros(size)
    for (top, left), window in zip(places, cosines, strict=True):
        height, width = min(sliding.crop, size[0]), min(sliding.crop, size[1])
        padded = (height + -height % sliding.patch, width + -width % sliding.patch)
        pixels = F.interpolate(
            window.permute(2, 0, 1)[None], size=padded, mode="bilinear", align_corners=False
        )
        here = slice(top, top + height), slice(left, left + width)
        total[:, *here] += pixels[0, :, :height, :width]
        seen[here] += 1
    return total / seen
