"""The fast image mode against the exact one: same pixels decoded, and how far the resize is off."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features.images import Preprocessing, decode, decode_fast, prepare_fast
from tests.photographs import as_jpeg, flickr, synthetic

LIMIT = 10**8
DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
}
PROCESSORS: list[dict[str, Any]] = [
    DINOV2,
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}},
    {"image_processor_type": "ViTImageProcessor"},  # bilinear
    {"image_processor_type": "CLIPImageProcessor", "size": 96, "crop_size": 112},  # pads
]
SIZES = [(500, 375), (375, 500), (147, 300), (300, 92), (64, 48), (224, 224), (1024, 683), (9, 200)]


def shares(photographs: list[bytes], config: dict[str, Any]) -> tuple[int, float, float]:
    """Greatest difference in grey levels, and the shares of values that differ, by more than 1."""
    preprocessing = Preprocessing.from_config(config)
    counts = np.zeros(256, dtype=np.int64)
    for data in photographs:
        exact = preprocessing.apply(decode(data, max_pixels=LIMIT))
        fast = prepare_fast(data, preprocessing, max_pixels=LIMIT)
        assert fast.dtype == np.uint8
        assert fast.shape == exact.shape
        difference = np.abs(exact.astype(np.int16) - fast)
        counts += np.bincount(difference.ravel(), minlength=256)
    return int(np.flatnonzero(counts).max()), *(counts[n:].sum() / counts.sum() for n in (1, 2))


@pytest.mark.parametrize("config", PROCESSORS, ids=lambda each: str(each["image_processor_type"]))
def test_real_photographs_differ_by_one_grey_level_in_a_third_of_a_percent(
    config: dict[str, Any],
) -> None:
    """400 photographs in all, measured: 0.000 % to 0.292 %, and at most 2 in a million by two."""
    greatest, any_difference, more_than_one = shares(flickr(60), config)
    assert greatest <= 2
    assert any_difference < 0.005
    assert more_than_one < 1e-5


@pytest.mark.parametrize("config", PROCESSORS, ids=lambda each: str(each["image_processor_type"]))
def test_synthetic_pictures_of_all_shapes_differ_as_little(config: dict[str, Any]) -> None:
    """Here 0.53 % differ at most. The shapes include those that Pillow shrinks height first."""
    pictures = [as_jpeg(synthetic(i, *size)) for i, size in enumerate(SIZES)]
    noise = [as_jpeg(synthetic(i, *size, coarseness=1)) for i, size in enumerate(SIZES)]
    greatest, any_difference, more_than_one = shares(pictures + noise, config)
    assert greatest <= 2
    assert any_difference < 0.01
    assert more_than_one < 1e-5


def test_a_float_resize_is_met_within_what_two_roundings_make() -> None:
    """The processor of DINOv3 rounds nothing; each of the two passes here rounds by a half."""
    preprocessing = Preprocessing.from_config({"image_processor_type": "DINOv3ViTImageProcessor"})
    for i, size in enumerate(SIZES):
        data = as_jpeg(synthetic(i, *size))
        exact = preprocessing.apply(decode(data, max_pixels=LIMIT)) * 255
        fast = prepare_fast(data, preprocessing, max_pixels=LIMIT)
        assert np.abs(exact - fast).max() <= 1.25


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95, "subsampling": 0},
        {"quality": 30, "subsampling": 2},
        {"progressive": True},
        {"keep_rgb": True, "subsampling": 0},
        {"restart_marker_blocks": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_of_every_kind_decode_to_the_pixels_of_pillow(
    mode: str, options: dict[str, object]
) -> None:
    data = as_jpeg(synthetic(1, 203, 151).convert(mode), **options)
    exact = np.asarray(decode(data, max_pixels=LIMIT))
    np.testing.assert_array_equal(decode_fast(data, max_pixels=LIMIT), exact)


def test_real_photographs_decode_to_the_pixels_of_pillow() -> None:
    for data in flickr(60):
        exact = np.asarray(decode(data, max_pixels=LIMIT))
        np.testing.assert_array_equal(decode_fast(data, max_pixels=LIMIT), exact)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGB", "WEBP")],
)
def test_other_files_are_decoded_by_pillow_and_resized_as_jpegs_are(mode: str, form: str) -> None:
    buffer = io.BytesIO()
    synthetic(2, 300, 200).convert(mode).save(buffer, form)
    data = buffer.getvalue()
    exact = np.asarray(decode(data, max_pixels=LIMIT))
    np.testing.assert_array_equal(decode_fast(data, max_pixels=LIMIT), exact)
    preprocessing = Preprocessing.from_config(DINOV2)
    difference = preprocessing.apply(Image.fromarray(exact)).astype(np.int16) - prepare_fast(
        data, preprocessing, max_pixels=LIMIT
    )
    assert np.abs(difference).max() <= 2
