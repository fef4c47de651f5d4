"""Open-vocabulary segmentation: every pixel takes the class whose text is nearest to its patch."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from features.errors import EvaluationError

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
