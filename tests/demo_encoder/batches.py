"""Draws scenes in batches for the bundled encoder, with what is asked about each picture."""

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from features.scenes.draw import BACKGROUND, draw
from features.scenes.shards import PICTURE
from features.scenes.world import CLASS_NAMES, SEEN, TEXTURES, sample_scene

INPUT = 64
"""Side in pixels of what the network sees."""

CELLS = 4
"""Side of its last feature map."""

MEAN, STD = 0.5, 0.25
PRETRAINING = 0
"""Number of the split in the seeds; those of the shards count from 1."""

AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """Pictures as the encoder sees them, and the truth about them."""

    pixels: UInt8[np.ndarray, "batch 3 height width"]
    labels: Int64[np.ndarray, "batch"]
    """Class of the main object."""
    textures: Int64[np.ndarray, "batch"]
    cells: Int64[np.ndarray, "batch rows columns"]
    """Class that covers a cell, the number of classes for bare background, -1 if neither does."""


def draw_batch(
    seed: tuple[int, int], start: int, count: int, classes: tuple[int, ...] = SEEN
) -> Batch:
    """Draw pictures at the size of the shards and resize them as the encoder's processor does.

    Args:
        seed: Seed and number of the split.
        start: Number of the first picture of the split.
        count: How many pictures.
        classes: Labels that any object may have.
    """
    pixels = np.empty((count, 3, INPUT, INPUT), dtype=np.uint8)
    labels, textures = np.empty((2, count), dtype=np.int64)
    cells = np.empty((count, CELLS, CELLS), dtype=np.int64)
    for row in range(count):
        scene = sample_scene((*seed, start + row), classes=classes)
        rgb, mask = draw(scene, PICTURE)
        small = Image.fromarray(rgb).resize((INPUT, INPUT), Image.Resampling.BILINEAR)
        pixels[row] = np.asarray(small).transpose(2, 0, 1)
        labels[row] = scene.label
        textures[row] = TEXTURES.index(scene.objects[0].texture)
        cells[row] = _covering(mask)
    return Batch(pixels, labels, textures, cells)


def pretraining_batches(seed: int, steps: int, rows: int) -> Iterator[Batch]:
    """Draw batches of pictures that are in no split, in another process, a few ahead."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        ahead: deque[Future[Batch]] = deque()
        for step in range(steps + AHEAD):
            if step < steps:
                ahead.append(pool.submit(draw_batch, (seed, PRETRAINING), step * rows, rows))
            if step >= AHEAD:
                yield ahead.popleft().result()


def normalised(
    pixels: UInt8[Tensor, "batch 3 height width"],
) -> Float32[Tensor, "batch 3 height width"]:
    """Return pictures as the network wants them."""
    return standardised(pixels.float() / 255)


def standardised(
    pictures: Float32[Tensor, "batch 3 height width"],
) -> Float32[Tensor, "batch 3 height width"]:
    """Return pictures with values in [0, 1] as the network wants them."""
    return (pictures - MEAN) / STD


def _covering(mask: UInt8[np.ndarray, "height width"]) -> Int64[np.ndarray, "rows columns"]:
    """Return the class on an eighth of a cell or more, that of the largest share."""
    side = len(mask) // CELLS
    cells = np.full((CELLS, CELLS), -1, dtype=np.int64)
    for row, column in np.ndindex(CELLS, CELLS):
        part = mask[row * side : (row + 1) * side, column * side : (column + 1) * side]
        counts = np.bincount(part.ravel(), minlength=BACKGROUND + 1)
        best = int(counts[:BACKGROUND].argmax())
        if counts[best] > 0.12 * part.size:
            cells[row, column] = best
        elif counts[BACKGROUND] == part.size:
            cells[row, column] = len(CLASS_NAMES)
    return cells
