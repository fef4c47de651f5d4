"""Segmented pictures of the report: classes as colours over the picture."""

import colorsys

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from evaluate.pictures import thumbnail

SIDE = 300
OPAQUE = 0.7
GOLDEN_ANGLE = 0.381966  # of a turn: hues of any number of classes stay apart
LIGHTNESS = (0.42, 0.6, 0.3)
SATURATION = 0.75


def class_colours(num_classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Return a colour for each class, the same for the same number of the class always."""
    colours = [
        colorsys.hls_to_rgb(number * GOLDEN_ANGLE % 1, LIGHTNESS[number % 3], SATURATION)
        for number in range(num_classes)
    ]
    rounded: np.ndarray = np.rint(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)
    return rounded


def overlay(
    picture: Image.Image,
    labels: Int64[np.ndarray, "height width"],
    colours: UInt8[np.ndarray, "classes 3"],
) -> str:
    """Return a picture with its classes painted over it, as a data URI.

    Args:
        picture: Of the size of the labels.
        labels: Classes; where they are -1, the picture is shown grey and dark.
        colours: Of the classes.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    painted = OPAQUE * colours[labels] + (1 - OPAQUE) * grey
    shown = np.where(labels[..., None] >= 0, painted, 0.4 * grey)
    return thumbnail(Image.fromarray(shown.astype(np.uint8)), side=SIDE)


def hex_colour(colour: UInt8[np.ndarray, "3"]) -> str:
    """Return a colour as CSS has it."""
    return "#" + "".join(f"{part:02x}" for part in colour.tolist())
