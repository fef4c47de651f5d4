"""Pictures that image encoders and their references are compared on."""

import numpy as np
import torch

from features.encoders import ImageEncoder
from tests import tiny

TOLERANCE = 1e-5  # of a value, after scaling to length 1, in float32
PICTURES = [(0, 60, 40), (1, 33, 90), (2, 32, 32)]
"""Seed, width and height."""


def unit(vectors: torch.Tensor) -> np.ndarray:
    """Scale vectors to length 1."""
    array = vectors.double().numpy()
    scaled: np.ndarray = array / np.linalg.norm(array, axis=1, keepdims=True)
    return scaled


def encoded(encoder: ImageEncoder) -> list[torch.Tensor]:
    """Encode the pictures as PNG files, a tensor for each column."""
    files = [tiny.encoded(tiny.picture(*each), "PNG") for each in PICTURES]
    return encoder.encode(torch.stack([torch.from_numpy(encoder.prepare(file)) for file in files]))
