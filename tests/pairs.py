"""Pairs of images that have one caption in every field."""

import torch
from torch import Tensor

from align.loss import Pairs


def pairs_of(weights: Tensor, ids: Tensor | None = None) -> Pairs:
    """Pair each image with its captions, whose weights are (images, fields)."""
    fields = torch.arange(weights.shape[1], device=weights.device)
    return Pairs(fields.expand(weights.shape), weights, ids)
