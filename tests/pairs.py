"""Pairs of images and captions, and the losses as their definitions write them, in float64."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from align.loss import Pairs

Kind = Literal["sigmoid", "infonce"]
IMAGES, FIELDS, DIM = 8, 2, 5
SCALE, BIAS = 6.0, -1.5


def pairs_of(weights: Tensor, ids: Tensor | None = None) -> Pairs:
    """Pair each image with its captions, whose weights are (images, fields)."""
    fields = torch.arange(weights.shape[1], device=weights.device)
    return Pairs(fields.expand(weights.shape), weights, ids)


def embeddings(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(IMAGES, DIM, generator=generator, dtype=torch.float64)
    text = torch.randn(IMAGES, FIELDS, DIM, generator=generator, dtype=torch.float64)
    return image, text


def pairs(case: str) -> Pairs:
    """Pairs with or without weights of the fields, a masked text, and repeated captions."""
    weights = torch.ones(IMAGES, FIELDS, dtype=torch.float64)
    if "weights" in case:
        weights *= torch.tensor([0.5, 2.0], dtype=torch.float64)
    if "masked" in case:
        weights[2, 1] = weights[5, 0] = 0
    ids = None
    if "identical" in case:
        ids = torch.arange(IMAGES * FIELDS).view(IMAGES, FIELDS)
        ids[3, 0] = ids[1, 0]  # the same short caption
        ids[4, 1] = ids[1, 0]  # and in another field
        ids[6] = ids[6, 0]  # both captions of one image the same
        ids[5, 0] = ids[2, 1]  # two missing captions: the same empty string
    return pairs_of(weights, ids)


def is_positive(pairs: Pairs, image: int, text: int) -> bool:
    if pairs.caption_ids is None:
        return text // FIELDS == image
    own = {
        int(pairs.caption_ids[image, field])
        for field in range(FIELDS)
        if pairs.weights[image, field] > 0
    }
    return int(pairs.caption_ids.flatten()[text]) in own


def dense(
    kind: Kind,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    pairs: Pairs,
    *,
    by_pair: bool,
) -> Tensor:
    """The definition in the docstring of `contrastive_loss`, term by term."""
    image, text, log_scale, bias = given
    text = text.flatten(0, 1)
    logits = log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    weights = pairs.weights.flatten()
    used = [j for j in range(len(text)) if weights[j] > 0]
    if kind == "sigmoid":
        total = logits.new_zeros(())
        for i in range(len(image)):
            for j in used:
                sign = 1 if is_positive(pairs, i, j) else -1
                total = total - weights[j] * F.logsigmoid(sign * logits[i, j])
        return total / (len(image) * (len(used) if by_pair else 1))
    over_texts, over_images, images, weight = logits.new_zeros(()), logits.new_zeros(()), 0, 0.0
    for i in range(len(image)):
        positives = [j for j in used if is_positive(pairs, i, j)]
        if positives:
            images += 1
            log_probability = logits[i, positives] - logits[i, used].logsumexp(0)
            share = weights[positives]
            over_texts = over_texts - (share * log_probability).sum() / share.sum()
    for j in used:
        owners = [i for i in range(len(image)) if is_positive(pairs, i, j)]
        log_probability = logits[owners, j] - logits[:, j].logsumexp(0)
        over_images = over_images - weights[j] * log_probability.mean()
        weight += float(weights[j])
    return (over_texts / images + over_images / weight) / 2


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image, text = embeddings()
    scale = torch.tensor(math.log(SCALE), dtype=torch.float64)
    bias = torch.tensor(BIAS, dtype=torch.float64)
    return tuple(each.requires_grad_() for each in (image, text, scale, bias))  # type: ignore[return-value]


CASES = ["plain", "weights", "masked", "identical", "identical masked", "identical masked weights"]
