"""Draws a scene with signed distances: an RGB picture, and the mask of its objects.

Arrays see only sums, products, quotients, square roots, minima and maxima, which all processors
round alike; sines are taken of single numbers. So a seed gives the same bytes in every process.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from features.scenes.world import Scene, SceneObject, generator

Plane = Float32[np.ndarray, "height width"]
Point = tuple[float, float]


def signed_distance(shape: str, x: Plane, y: Plane) -> Plane:
    """Return how far each point is from the edge of a shape: negative inside, positive outside.

    Away from corners it is the true distance; beyond one it may be less, which only rounds shadows.

    Args:
        shape: One of `features.scenes.world.SHAPES`.
        x: To the right.
        y: Downwards.
    """
    return DISTANCES[shape](x, y)


def _hexagon(x: Plane, y: Plane) -> Plane:
    slanted = np.float32(0.866) * np.abs(x) + np.float32(0.5) * np.abs(y)
    return np.asarray(np.maximum(slanted, np.abs(y)) - np.float32(0.82))


def _star(x: Plane, y: Plane) -> Plane:
    """Fold the plane into one tenth of the star, as Inigo Quilez's sdStar5 does."""
    inner, outer = 0.46, 1.05
    c, s = 0.80901699, 0.58778525
    px, py = np.abs(x), -y
    for fold_x, fold_y in ((c, -s), (-c, -s)):
        fold = 2 * np.maximum(np.float32(fold_x) * px + np.float32(fold_y) * py, 0)
        px, py = px - fold * np.float32(fold_x), py - fold * np.float32(fold_y)
    px, py = np.abs(px), py - np.float32(outer)
    ray_x, ray_y = inner * s, inner * c - 1  # from a tip to the notch beside it, for radius one
    length = math.hypot(ray_x, ray_y)
    ray_x, ray_y = ray_x / length, ray_y / length
    along = np.clip(px * np.float32(ray_x) + py * np.float32(ray_y), 0, np.float32(outer * length))
    away = _length(px - along * np.float32(ray_x), py - along * np.float32(ray_y))
    outside = py * np.float32(ray_x) - px * np.float32(ray_y) > 0
    return np.asarray(np.where(outside, away, -away))


def _heart(x: Plane, y: Plane) -> Plane:
    """Two discs above a wedge, as Inigo Quilez's sdHeart."""
    scale = np.float32(1.62)
    px, py = np.abs(x) / scale, (np.float32(0.93) - y) / scale
    disc = _length(px - np.float32(0.25), py - np.float32(0.75)) - np.float32(math.sqrt(2) / 4)
    tip = px * px + (py - 1) * (py - 1)
    fall = np.float32(0.5) * np.maximum(px + py, 0)
    side = np.sqrt(np.minimum(tip, (px - fall) * (px - fall) + (py - fall) * (py - fall)))
    return np.asarray(scale * np.where(px + py > 1, disc, np.where(px > py, side, -side)))


def _crescent(x: Plane, y: Plane) -> Plane:
    bite = np.float32(0.74) - _length(x - np.float32(0.42), y + np.float32(0.08))
    return np.asarray(np.maximum(_length(x, y) - np.float32(0.93), bite))


def _arrow(x: Plane, y: Plane) -> Plane:
    head = _polygon(x, y, ((0.0, -1.0), (0.78, -0.05), (-0.78, -0.05)))
    return np.asarray(np.minimum(head, _box(x, y - np.float32(0.42), 0.27, 0.52)))


def _length(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.sqrt(x * x + y * y))


def _box(x: Plane, y: Plane, width: float, height: float) -> Plane:
    return np.asarray(np.maximum(np.abs(x) - np.float32(width), np.abs(y) - np.float32(height)))


def _polygon(x: Plane, y: Plane, corners: tuple[Point, ...]) -> Plane:
    """Return the distance to the nearest side of a convex polygon, its corners clockwise."""
    distance = np.full_like(x, -np.inf)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(x2 - x1, y2 - y1)
        out_x, out_y = (y2 - y1) / length, (x1 - x2) / length
        side = x * np.float32(out_x) + y * np.float32(out_y) - np.float32(x1 * out_x + y1 * out_y)
        distance = np.maximum(distance, side)
    return distance


HALF_DISC = np.float32(0.4)
DISTANCES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda x, y: _length(x, y) - np.float32(0.9),
    "square": lambda x, y: _box(x, y, 0.76, 0.76),
    "triangle": lambda x, y: _polygon(x, y, ((0.0, -0.96), (0.88, 0.62), (-0.88, 0.62))),
    "diamond": lambda x, y: (
        (np.abs(x) + np.float32(0.6) * np.abs(y) - np.float32(0.6)) / np.float32(1.166)
    ),
    "hexagon": _hexagon,
    "star": _star,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.94, 0.33), _box(x, y, 0.33, 0.94)),
    "ring": lambda x, y: np.abs(_length(x, y) - np.float32(0.68)) - np.float32(0.25),
    "heart": _heart,
    "crescent": _crescent,
    "semicircle": lambda x, y: np.maximum(
        _length(x, y - HALF_DISC) - np.float32(0.98), y - HALF_DISC
    ),
    "arrow": _arrow,
}


BACKGROUND = 255
"""Mask value where there is no object."""

RGB = {
    "red": (214, 38, 42),
    "orange": (242, 138, 34),
    "yellow": (236, 206, 46),
    "green": (52, 168, 70),
    "teal": (26, 158, 152),
    "blue": (44, 84, 216),
    "purple": (134, 56, 196),
    "pink": (242, 126, 184),
    "brown": (128, 78, 42),
    "gray": (142, 142, 142),
}
LIGHT = (-0.5, -0.87)
"""Where the light comes from, in picture coordinates."""

Picture = Float32[np.ndarray, "3 height width"]  # planes, which numpy works on faster


def draw(
    scene: Scene, size: int
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Draw a scene as a square of `size` pixels.

    Returns:
        The picture, and a mask with the label of the object at each pixel, or `BACKGROUND`.
    """
    random = generator(scene.grain)
    pixels = _background(scene, size, random)
    mask = np.full((size, size), BACKGROUND, dtype=np.uint8)
    for thing in scene.objects:
        _paint(thing, pixels, mask)
    pixels *= _vignette(size)
    noise = random.integers(0, 256, (size, size), dtype=np.uint8).astype(np.float32)
    noise -= np.float32(127.5)
    noise *= np.float32(0.035 + 0.05 * random.random())
    pixels += noise
    np.clip(pixels, 0, 255, out=pixels)
    rgb = np.empty((size, size, 3), dtype=np.uint8)
    rgb[...] = pixels.transpose(1, 2, 0)
    return rgb, mask


@dataclass(frozen=True)
class _Patch:
    """The part of a picture around one object, in its own coordinates (radius 1, turned)."""

    rows: slice
    columns: slice
    x: Plane
    y: Plane
    pixel: float
    """Side of one pixel in these coordinates."""


def _paint(thing: SceneObject, pixels: Picture, mask: UInt8[np.ndarray, "height width"]) -> None:
    """Lay the shadow of an object, then the object, over what is there."""
    patch = _patch(thing, len(mask))
    here = pixels[:, patch.rows, patch.columns]
    distance = signed_distance(thing.shape, patch.x, patch.y)
    here *= 1 - np.float32(0.42) * _shadow(thing, patch)
    cover = _unit(0.5 - distance / patch.pixel)
    here += cover * (_surface(thing, patch, distance) - here)
    mask[patch.rows, patch.columns][distance < 0] = thing.label


def _patch(thing: SceneObject, size: int) -> _Patch:
    reach = 1.35 * thing.radius
    rows, columns = (
        slice(max(0, int((centre - reach) * size)), min(size, int((centre + reach) * size) + 2))
        for centre in (thing.y, thing.x)
    )
    down = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / size - thing.y
    right = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) / size - thing.x
    cosine = math.cos(math.radians(thing.angle)) / thing.radius
    sine = math.sin(math.radians(thing.angle)) / thing.radius
    x = (cosine * right)[None, :] + (sine * down)[:, None]
    y = (cosine * down)[:, None] - (sine * right)[None, :]
    return _Patch(rows, columns, x, y, 1 / (size * thing.radius))


def _shadow(thing: SceneObject, patch: _Patch) -> Plane:
    """Return the darkness, 0 to 1, of a soft shadow that falls to the lower right."""
    cosine, sine = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    right, down = 0.09, 0.13
    x = patch.x - np.float32(cosine * right + sine * down)
    y = patch.y - np.float32(cosine * down - sine * right)
    soft = _unit(0.5 - signed_distance(thing.shape, x, y) / 0.3)
    return np.asarray(soft * soft * (3 - 2 * soft))


def _surface(thing: SceneObject, patch: _Patch, distance: Plane) -> Picture:
    """Return the colours of an object: texture, light from above, and a darker rim."""
    random = generator(thing.grain)
    jitter = 22 * (random.random(3) - 0.5) + 26 * (random.random() - 0.5)
    base = np.clip(np.asarray(RGB[thing.colour]) + jitter, 0, 255)
    if random.random() < 0.55:
        second = base + (255 - base) * (0.55 + 0.2 * random.random())
    else:
        second = base * (0.3 + 0.2 * random.random())
    amount = _texture(thing, patch, random)
    colours = amount * _colour(second - base) + _colour(base)
    angle = math.radians(thing.angle)
    towards = (
        LIGHT[0] * math.cos(angle) + LIGHT[1] * math.sin(angle),
        LIGHT[1] * math.cos(angle) - LIGHT[0] * math.sin(angle),
    )
    light = 1 + np.float32(0.13 * towards[0]) * patch.x + np.float32(0.13 * towards[1]) * patch.y
    rim = _unit(1 + distance / max(0.11, 1.6 * patch.pixel))
    colours *= light * (1 - 0.5 * rim * rim)
    return np.asarray(colours)


def _colour(rgb: Float64[np.ndarray, "3"]) -> Float32[np.ndarray, "3 1 1"]:
    return rgb.astype(np.float32)[:, None, None]


def _texture(thing: SceneObject, patch: _Patch, random: np.random.Generator) -> Plane:
    """Return how much of the second colour there is at each pixel, 0 to 1."""
    if thing.texture == "solid":
        return np.zeros_like(patch.x)
    turn = math.pi * random.random() if thing.texture == "striped" else 0.6 * random.random() - 0.3
    period = max(0.36 + 0.12 * random.random(), 4.2 * patch.pixel)
    along = _turned(patch, math.cos(turn), math.sin(turn), period, random)
    if thing.texture == "striped":
        return _unit((np.abs(along) - 0.25) * (period / patch.pixel) + 0.5)
    across = _turned(patch, -math.sin(turn), math.cos(turn), period, random)
    if thing.texture == "dotted":
        from_centre = np.sqrt(along * along + across * across)
        return _unit((0.3 - from_centre) * (period / patch.pixel) + 0.5)
    along, across = (
        _unit((np.abs(wave) - 0.25) * (period / patch.pixel) + 0.5) - 0.5
        for wave in (along, across)
    )
    return np.asarray(0.5 + 2 * along * across)


def _turned(
    patch: _Patch, cosine: float, sine: float, period: float, random: np.random.Generator
) -> Plane:
    """Return the place along a direction within its period, from -0.5 to 0.5."""
    place = patch.x * np.float32(cosine / period) + patch.y * np.float32(sine / period)
    place += np.float32(random.random())
    return np.asarray(place - np.floor(place) - np.float32(0.5))


def _background(scene: Scene, size: int, random: np.random.Generator) -> Picture:
    level = 0.72 + 0.22 * random.random() if scene.tone == "pale" else 0.13 + 0.2 * random.random()
    tint = (0.16 if scene.tone == "pale" else 0.09) * (random.random(3) - 0.5)
    contrast = (0.1 + 0.1 * random.random()) * (-1 if scene.tone == "pale" else 0.7)
    first = level + tint
    second = level + contrast + tint + 0.1 * (random.random(3) - 0.5)
    pixels = np.empty((3, size, size), dtype=np.float32)
    np.multiply(_ground(scene.ground, size, random), _colour(255 * (second - first)), out=pixels)
    pixels += _colour(255 * first)
    return pixels


def _ground(ground: str, size: int, random: np.random.Generator) -> Plane:
    """Return how much of the background's second colour there is at each pixel, 0 to 1."""
    if ground == "plain":
        return np.zeros((size, size), dtype=np.float32)
    if ground == "cloudy":
        return _clouds(size, random)
    turn = math.pi * (2 * random.random() if ground == "gradient" else random.random())
    place = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    right, down = np.float32(math.cos(turn)) * place, np.float32(math.sin(turn)) * place
    along = right + down[:, None]
    if ground == "gradient":
        return _unit(0.5 + along) * np.float32(1.5)
    period = 0.09 + 0.07 * random.random()
    wave = along / np.float32(period) + np.float32(random.random())
    wave -= np.floor(wave)
    edge = np.float32(period * size)
    return np.asarray(_unit((np.abs(wave - np.float32(0.5)) - np.float32(0.25)) * edge + 0.5))


def _clouds(size: int, random: np.random.Generator) -> Plane:
    """Return smooth noise: a coarse grid of random values, interpolated along both axes."""
    cells = 6
    grid = 1.6 * random.random((cells, cells)).astype(np.float32)
    place = (np.arange(size, dtype=np.float32) + 0.5) * np.float32((cells - 1) / size)
    left = np.minimum(place.astype(np.int64), cells - 2)
    step = place - left.astype(np.float32)
    step = step * step * (3 - 2 * step)
    wide = grid[:, left] + step * (grid[:, left + 1] - grid[:, left])  # (cells, size)
    return np.asarray(wide[left] + step[:, None] * (wide[left + 1] - wide[left]))


@lru_cache(maxsize=4)
def _vignette(size: int) -> Plane:
    place = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return np.asarray(1 - np.float32(0.32) * (place * place)[:, None] - 0.32 * place * place)


def _unit(values: Plane) -> Plane:
    """Return the values cut to [0, 1]; several times faster than `np.clip` on small arrays."""
    return np.asarray(np.minimum(np.maximum(values, np.float32(0)), np.float32(1)))
