"""Our preprocessing against the Pillow processors of transformers, to the last bit of uint8."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from features.images import Preprocessing

SIZES = [(224, 224), (96, 96), (300, 200), (201, 333), (640, 251), (37, 500)]


def drawn(width: int, height: int) -> Image.Image:
    """A picture with edges and noise, so that every filter and crop shows."""
    random = np.random.default_rng(width * 1000 + height)
    rows, columns = np.mgrid[0:height, 0:width]
    pattern = 127 + 90 * np.sin(rows / 7) * np.cos(columns / 11)
    pixels = pattern[..., None] + random.normal(0, 30, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("BitImageProcessor", {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406]}),
    ("BitImageProcessor", {}),
    ("ViTImageProcessor", {}),
    ("ViTImageProcessor", {"size": 64}),
    ("CLIPImageProcessor", {}),
    ("CLIPImageProcessor", {"size": 64, "crop_size": 48}),  # as in checkpoints of 2021
    ("SiglipImageProcessor", {}),
    ("MobileNetV2ImageProcessor", {}),
    ("DeiTImageProcessor", {}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessor", {}),
]


@pytest.mark.parametrize(("name", "settings"), PROCESSORS, ids=str)
def test_equals_the_processor_of_transformers(name: str, settings: dict[str, Any]) -> None:
    theirs = getattr(transformers, name + "Pil")(**settings)
    ours = Preprocessing.from_config(settings | {"image_processor_type": name})
    for size in SIZES:
        image = drawn(*size)
        expected = theirs(image, return_tensors="pt")["pixel_values"]
        found = ours.normalise(torch.from_numpy(ours.apply(image))[None])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert tuple(found.shape[2:]) == ours.output_size


def test_dinov3_resizes_in_float_with_the_filter_of_pillow() -> None:
    """Its own processor needs torchvision. Pillow resizes float images by the same definition."""
    ours = Preprocessing.from_config({"image_processor_type": "DINOv3ViTImageProcessor"})
    for size in SIZES:
        image = drawn(*size)
        channels = [channel.convert("F") for channel in image.split()]
        resized = [channel.resize((224, 224), Image.Resampling.BILINEAR) for channel in channels]
        expected = np.stack([np.asarray(channel) for channel in resized]) / 255
        np.testing.assert_allclose(ours.apply(image), expected, atol=1e-5)  # weights differ
