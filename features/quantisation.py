"""Features in 8 bits: each row as whole numbers from -127 to 127 and one factor for all of them."""

import numpy as np
from jaxtyping import Float16, Float32, Int8

GREATEST = 127


def quantise(
    features: Float16[np.ndarray, "rows dim"],
) -> tuple[Int8[np.ndarray, "rows dim"], Float32[np.ndarray, "rows"]]:
    """Round each row to the multiples of its greatest value / 127.

    Returns:
        The whole numbers, and the factor of each row; 0 where all of it is zero.
    """
    values = features.astype(np.float32)
    scale = np.abs(values).max(axis=1, initial=0) / np.float32(GREATEST)
    values /= np.where(scale > 0, scale, np.float32(1))[:, None]
    return np.rint(values).astype(np.int8), scale


def dequantise(
    values: Int8[np.ndarray, "rows dim"], scale: Float32[np.ndarray, "rows"]
) -> Float16[np.ndarray, "rows dim"]:
    """Return the features that whole numbers and the factors of their rows stand for."""
    features: np.ndarray = (values * scale[:, None]).astype(np.float16)
    return features
