"""Signed distances of the twelve shapes, in coordinates where each fits a circle of radius 1.1."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

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


def _circle(x: Plane, y: Plane) -> Plane:
    return np.asarray(_length(x, y) - np.float32(0.9))


def _square(x: Plane, y: Plane) -> Plane:
    return _box(x, y, 0.76, 0.76)


def _triangle(x: Plane, y: Plane) -> Plane:
    return _polygon(x, y, ((0.0, -0.96), (0.88, 0.62), (-0.88, 0.62)))


def _diamond(x: Plane, y: Plane) -> Plane:
    return np.asarray(
        (np.abs(x) + np.float32(0.6) * np.abs(y) - np.float32(0.6)) / np.float32(1.166)
    )


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


def _cross(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.minimum(_box(x, y, 0.94, 0.33), _box(x, y, 0.33, 0.94)))


def _ring(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.abs(_length(x, y) - np.float32(0.68)) - np.float32(0.25))


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


def _semicircle(x: Plane, y: Plane) -> Plane:
    return np.asarray(
        np.maximum(_length(x, y - np.float32(0.4)) - np.float32(0.98), y - np.float32(0.4))
    )


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


DISTANCES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "hexagon": _hexagon,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
    "semicircle": _semicircle,
    "arrow": _arrow,
}
