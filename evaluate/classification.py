"""Classification of images by the embeddings of their classes."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

COSINES_AT_ONCE = 1 << 23
TIE = 1e-6


@dataclass(frozen=True)
class Classified:
    """What became of the images of a labelled split."""

    labels: Int64[np.ndarray, "images"]
    predicted: Int64[np.ndarray, "images"]
    """Nearest class; when a wrong one is as near as the right one, the wrong one."""
    ranks: Int64[np.ndarray, "images"]
    """Wrong classes as near as the right one."""

    def select(self, images: Bool[np.ndarray, "images"]) -> "Classified":
        """Return some of the images."""
        return Classified(self.labels[images], self.predicted[images], self.ranks[images])


def class_embeddings(
    prompts: Float[Tensor, "classes templates dim"],
) -> Float[Tensor, "classes dim"]:
    """Return one embedding per class: each prompt normalised, their mean, normalised again.

    Reference:
        Radford et al. 2021, CLIP, arXiv:2103.00020, section 3.1.4 (prompt ensembling).
    """
    return F.normalize(F.normalize(prompts, dim=-1).mean(dim=1), dim=-1)


def classify(
    image: Float[Tensor, "images dim"],
    classes: Float[Tensor, "classes dim"],
    labels: Int64[np.ndarray, "images"],
) -> Classified:
    """Compare every image with every class, block by block.

    A wrong class as near as the right one (to within 1e-6 of cosine) counts as nearer, and so does
    one whose cosine is not a number.

    Args:
        image: Image embeddings of any length; normalised here.
        classes: From `class_embeddings`.
        labels: The class of each image.
    """
    step = max(1, COSINES_AT_ONCE // max(len(classes), 1))
    ranks, predicted = [], []
    for start in range(0, len(image), step):
        right = torch.from_numpy(labels[start : start + step]).to(image.device)[:, None]
        cosine = F.normalize(image[start : start + step], dim=-1) @ classes.T
        nearer = ~(cosine < cosine.gather(1, right) - TIE)
        nearer.scatter_(1, right, value=False)
        rank = nearer.sum(dim=1)
        wrong = cosine.nan_to_num(nan=2.0).scatter(1, right, -2.0).argmax(dim=1)
        ranks.append(rank.cpu().numpy())
        predicted.append(torch.where(rank == 0, right[:, 0], wrong).cpu().numpy())
    empty = [np.empty(0, dtype=np.int64)]
    return Classified(labels, np.concatenate(predicted or empty), np.concatenate(ranks or empty))
