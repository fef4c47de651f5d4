"""Compositional scores: captions that differ in how the same things combine.

A group is two images with a caption each (Winoground, MMVP-VLM), or one image with a right caption
and wrong ones (SugarCrepe, ARO).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": round(1 / 6, 8)}
"""Scores of random cosines: both of two independent choices, and all four at once."""


@dataclass(frozen=True)
class Compositional:
    """The cosines of every group, and which of its choices were right."""

    cosines: Float[np.ndarray, "groups 2 2"]
    """Image i of the group (row) with caption j (column)."""

    @property
    def text(self) -> Bool[np.ndarray, "groups"]:
        """Each image is nearer to its own caption than to the other one."""
        s = self.cosines
        right: np.ndarray = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
        return right

    @property
    def image(self) -> Bool[np.ndarray, "groups"]:
        """Each caption is nearer to its own image than to the other one."""
        s = self.cosines
        right: np.ndarray = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
        return right

    @property
    def group(self) -> Bool[np.ndarray, "groups"]:
        """All of that."""
        right: np.ndarray = self.text & self.image
        return right

    def hits(self) -> dict[str, Bool[np.ndarray, "groups"]]:
        """Return what each group scores, by the name of the metric."""
        return {"text_score": self.text, "image_score": self.image, "group_score": self.group}


def compare_groups(
    image: Float[np.ndarray, "rows dim"],
    text: Float[np.ndarray, "rows dim"],
    pairs: Int64[np.ndarray, "groups 2"],
) -> Compositional:
    """Compare both images with both captions of every group.

    A choice between equally near ones counts as wrong, and so does one with a cosine that is not a
    number. Cosines are computed in float64, each in the same order, so that equal captions tie.

    Args:
        image: Image embeddings of any length; normalised here.
        text: Caption embeddings; row i is the caption of row i of `image`.
        pairs: The two rows of each group, from `pair_rows`.

    Reference:
        Thrush et al. 2022, Winoground, arXiv:2204.03162, equations 1 to 3.
    """
    images, texts = _normalised(image[pairs]), _normalised(text[pairs])  # (groups, 2, dim)
    cosines = np.empty((len(pairs), 2, 2))
    for i in range(2):
        for j in range(2):
            cosines[:, i, j] = (images[:, i] * texts[:, j]).sum(axis=-1)
    return Compositional(cosines)


def choose_captions(
    image: Float[np.ndarray, "groups dim"], text: Float[np.ndarray, "groups captions dim"]
) -> Bool[np.ndarray, "groups"]:
    """Return for which images their first caption is nearer than each of the others.

    Equally near ones, and cosines that are not numbers, count as wrong, as in `compare_groups`.

    Args:
        image: Image embeddings of any length; normalised here.
        text: Caption embeddings, likewise; the first of each image is the right one.

    Reference:
        Hsieh et al. 2023, SugarCrepe, arXiv:2306.14610; Yuksekgonul et al. 2023, ARO,
        arXiv:2210.01936, whose argmax would count some ties as right.
    """
    cosines = (_normalised(image)[:, None] * _normalised(text)).sum(axis=-1)
    right: np.ndarray = (cosines[:, :1] > cosines[:, 1:]).all(axis=1)
    return right


def pair_rows(
    groups: Int[np.ndarray, "rows"], usable: Bool[np.ndarray, "rows"]
) -> tuple[Int64[np.ndarray, "groups 2"], int]:
    """Return the two rows of each group in order, and how many groups are left out.

    A group is left out when it has not exactly two rows, or one of them cannot be used.

    Args:
        groups: The group of each row, -1 for none.
        usable: Rows whose image and caption are ok.
    """
    numbers, first, counts = np.unique(groups, return_index=True, return_counts=True)
    order = np.argsort(groups, kind="stable")
    starts = np.cumsum(counts) - counts
    chosen = (numbers >= 0) & (counts == 2)
    pairs = np.stack([order[starts[chosen]], order[starts[chosen] + 1]], axis=1)
    pairs = pairs[np.argsort(first[chosen], kind="stable")]
    pairs = pairs[usable[pairs].all(axis=1)]
    return pairs, int((numbers >= 0).sum()) - len(pairs)


def _normalised(rows: Float[np.ndarray, "*rows dim"]) -> Float[np.ndarray, "*rows dim"]:
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    normalised: np.ndarray = rows / np.maximum(norms, 1e-12)
    return normalised
