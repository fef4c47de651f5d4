"""What holds for decoding and preprocessing, whatever the image."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil

from features.images import ImageFault, Preprocessing, decode, decode_fast
from features.status import Status
from tests import tiny
from tests.photographs import as_jpeg, synthetic

# In a run Pillow's warnings are switched off by `features.images`; pytest switches all on again.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FILES = {
    form: tiny.encoded(tiny.picture(5, 33, 21), form)
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
}
JPEGS = {
    "baseline": as_jpeg(synthetic(0, 60, 45)),
    "progressive": as_jpeg(synthetic(1, 60, 45), progressive=True),
    "grey": as_jpeg(synthetic(2, 60, 45).convert("L")),
    "cmyk": as_jpeg(synthetic(3, 60, 45).convert("CMYK")),
    "restarts": as_jpeg(synthetic(4, 60, 45), restart_marker_blocks=2),
}
sides = st.integers(1, 70)


def outcome(decoder: Callable[..., object], data: bytes) -> Status | np.ndarray:
    """The pixels, or why there are none."""
    try:
        return np.asarray(decoder(data, max_pixels=100_000))
    except ImageFault as fault:
        return fault.status


@settings(deadline=None, max_examples=200)
@given(data=st.data(), form=st.sampled_from(sorted(FILES)))
def test_damaged_bytes_decode_or_are_quarantined(data: st.DataObject, form: str) -> None:
    content = bytearray(FILES[form])
    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8)
    for place, value in data.draw(places):
        content[place] = value
    cut = data.draw(st.integers(0, len(content)))
    with contextlib.suppress(ImageFault):
        assert decode(bytes(content[:cut]), max_pixels=100_000).mode == "RGB"


@settings(deadline=None, max_examples=300)
@given(data=st.data(), kind=st.sampled_from(sorted(JPEGS)))
def test_a_damaged_jpeg_fares_in_the_fast_mode_as_in_the_exact_one(
    data: st.DataObject, kind: str
) -> None:
    content = bytearray(JPEGS[kind])
    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)
    for place, value in data.draw(places):
        content[place] = value
    damaged = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    exact, fast = outcome(decode, damaged), outcome(decode_fast, damaged)
    assert type(exact) is type(fast)
    np.testing.assert_array_equal(exact, fast)


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=200))
def test_any_bytes_decode_or_are_quarantined(content: bytes) -> None:
    with contextlib.suppress(ImageFault):
        decode(content, max_pixels=100_000)


@settings(deadline=None, max_examples=60)
@given(width=sides, height=sides, resize=st.integers(4, 60) | st.none(), crop=st.integers(1, 64))
def test_sizes_and_crops_are_those_of_transformers(
    width: int, height: int, resize: int | None, crop: int
) -> None:
    config = {
        "do_resize": resize is not None,
        "size": {"shortest_edge": resize or 1},
        "crop_size": {"height": crop, "width": crop + 3},
        "do_rescale": False,
        "do_normalize": False,
    }
    image = tiny.picture(width * 100 + height, width, height)
    ours = Preprocessing.from_config(config | {"image_processor_type": "BitImageProcessor"})
    theirs = BitImageProcessorPil(**config)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours.apply(image), theirs)
    assert ours.output_size == (crop, crop + 3)


@settings(deadline=None, max_examples=40)
@given(width=sides, height=sides, size=st.integers(4, 60) | st.integers(384, 390))
def test_convnext_resizes_in_either_of_its_ways(width: int, height: int, size: int) -> None:
    config = {"size": {"shortest_edge": size}, "do_rescale": False, "do_normalize": False}
    image = tiny.picture(width * 100 + height, width, height)
    ours = Preprocessing.from_config(config | {"image_processor_type": "ConvNextImageProcessor"})
    theirs = ConvNextImageProcessorPil(**config)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours.apply(image), theirs)
