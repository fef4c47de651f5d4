"""Zero-shot classification: images against the embeddings of prompts made from class names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from features.class_lists import CLASS_LISTS, read_class_list
from features.errors import EvaluationError

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

    def top(self, k: int) -> float:
        """Return the fraction of images whose class is among the k nearest."""
        return float(np.mean(self.ranks < k))

    def mean_per_class(self) -> float:
        """Return the mean over the classes there are of the fraction that is right."""
        return mean_per_class(self.labels, self.ranks == 0)


def read_templates(setting: Sequence[str] | str) -> tuple[str, ...]:
    """Return the prompts of a setting.

    Args:
        setting: The prompts themselves, the name of one of `CLASS_LISTS`, or the path of a JSON
            file `{"templates": […]}`.

    Raises:
        EvaluationError: The file cannot be read, or holds no list of prompts.
    """
    if not isinstance(setting, str):
        return tuple(setting)
    if setting in CLASS_LISTS:
        return read_class_list(setting).templates
    try:
        templates = json.loads(Path(setting).read_text(encoding="utf-8"))["templates"]
        if not isinstance(templates, list) or not all(isinstance(each, str) for each in templates):
            raise TypeError("its `templates` are no list of texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"The templates {setting!r} cannot be read: {error}. One of {', '.join(CLASS_LISTS)}, "
            f'or a JSON file {{"templates": ["a photo of a {{}}."]}} was expected. Correct '
            f"eval.templates."
        ) from error
    return tuple(templates)


def make_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Put every class name into every template: all prompts of the first class come first.

    Raises:
        EvaluationError: There is no template, or one has no place for the name.
    """
    if not templates:
        raise EvaluationError(
            "eval.templates is empty. At least one template was expected, such as 'a photo of a "
            "{}.'. Give one, or leave the setting out."
        )
    for template in templates:
        if "{}" not in template:
            raise EvaluationError(
                f"eval.templates has {template!r}, which has no place for the class name. One {{}} "
                f"was expected, as in 'a photo of a {{}}.'. Correct it."
            )
    return [template.replace("{}", name) for name in class_names for template in templates]


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


def mean_per_class(
    labels: Int64[np.ndarray, "images"], correct: Bool[np.ndarray, "images"]
) -> float:
    """Return the mean over the classes there are of the fraction of images that is correct."""
    counts = np.bincount(labels)
    right = np.bincount(labels[correct], minlength=len(counts))
    return float(np.mean(right[counts > 0] / counts[counts > 0]))


def confusion_matrix(
    labels: Int64[np.ndarray, "images"],
    predicted: Int64[np.ndarray, "images"],
    num_classes: int,
) -> Int64[np.ndarray, "classes classes"]:
    """Count images by their class (row) and the class they were taken for (column)."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)
