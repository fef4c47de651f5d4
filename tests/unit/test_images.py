"""Decoding: what is quarantined and why, and what colour spaces become."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from features.errors import EncoderError
from features.images import ImageFault, Preprocessing, decode, decode_fast, reads_heic
from features.status import Status
from tests import tiny
from tests.photographs import as_jpeg, sideways, synthetic

LIMIT = 1_000_000


def status_of(data: bytes, max_pixels: int = LIMIT) -> Status:
    with pytest.raises(ImageFault) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value.status


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, and ends where its pixels would begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 100) + b"IDAT"


def test_no_bytes_are_an_empty_image() -> None:
    assert status_of(b"") == Status.EMPTY_IMAGE


@pytest.mark.parametrize("data", [b"<html>", b"BMW", bytes(1000), b"%!PS-Adobe-3.0"])
def test_other_bytes_are_no_image(data: bytes) -> None:
    assert status_of(data) == Status.NOT_AN_IMAGE


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
def test_an_image_cut_off_anywhere_is_truncated(form: str, part: float) -> None:
    data = tiny.encoded(tiny.picture(0, 200, 150), form)
    assert status_of(data[: int(len(data) * part)]) == Status.TRUNCATED_IMAGE


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    assert status_of(png_header(1_000_000, 1_000_000)) == Status.IMAGE_TOO_LARGE
    data = tiny.encoded(tiny.picture(0, 20, 10), "PNG")
    assert status_of(data, max_pixels=199) == Status.IMAGE_TOO_LARGE
    assert decode(data, max_pixels=200).size == (20, 10)


def test_the_content_decides_and_not_a_name() -> None:
    for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        assert decode(tiny.encoded(tiny.picture(1), form), max_pixels=LIMIT).mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        *[("1", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("P", "GIF"), ("P", "PNG")],
        *[("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("I", "TIFF")],
        *[("F", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF")],
    ],
)
def test_every_colour_space_becomes_what_pillow_makes_of_it(mode: str, form: str) -> None:
    image = tiny.picture(2, 40, 30)
    if mode == "I;16":
        image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) // 5)
    elif mode == "LAB":
        image = Image.merge("LAB", image.split())
    else:
        image = image.convert(mode)
    data = tiny.encoded(image, form)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data, max_pixels=LIMIT)), expected)


@pytest.mark.parametrize("read", [decode, decode_fast])
@pytest.mark.parametrize(
    ("dtype", "least", "most", "words"),
    [
        (np.float32, 0, 1, r"from 0 to 1 \(mode F\), and 0 to 255 were"),
        (np.float32, -1, 1, "from -1 to 1"),
        (np.float32, 0, np.nan, "from nan to nan"),
        (np.uint16, 0, 4095, r"from 0 to 4095 \(mode I;16"),
        (np.int32, -5, 200, "from -5 to 200"),
        (np.float32, 0, 255, None),
        (np.uint16, 0, 255, None),
        (np.float32, 0, 0, None),
    ],
)
def test_values_that_8_bits_cannot_hold_are_refused_with_their_range(
    read: Callable[..., Any], dtype: Any, least: float, most: float, words: str | None
) -> None:
    pixels = np.full((8, 8), least, dtype=dtype)
    pixels[0, 0], pixels[0, 1] = most, (least + most) / 2
    data = tiny.encoded(Image.fromarray(pixels), "TIFF")
    if words is None:
        read(data, max_pixels=LIMIT)
    else:
        with pytest.raises(ImageFault, match=words) as caught:
            read(data, max_pixels=LIMIT)
        assert caught.value.status is Status.NOT_AN_IMAGE


def test_orientation_is_left_as_the_processors_leave_it() -> None:
    data = sideways(tiny.picture(3, 40, 20), 6)
    assert decode(data, max_pixels=LIMIT).size == (40, 20)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_upright_where_that_is_asked_for(orientation: int, form: str) -> None:
    data = sideways(synthetic(3, 40, 20), orientation, form)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((20, 40) if 5 <= orientation <= 8 else (40, 20))
    found = decode(data, max_pixels=LIMIT, upright=True)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    fast = decode_fast(data, max_pixels=LIMIT, upright=True)
    np.testing.assert_array_equal(fast, np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as features.images ignores it
def test_exif_data_that_cannot_be_read_turn_nothing() -> None:
    data = as_jpeg(tiny.picture(3, 40, 20), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12")
    assert decode(data, max_pixels=LIMIT, upright=True).size == (40, 20)
    data = as_jpeg(tiny.picture(3, 40, 20), exif=b"Exif\0\0nonsense")
    assert decode(data, max_pixels=LIMIT, upright=True).size == (40, 20)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    assert decode(buffer.getvalue(), max_pixels=LIMIT).getpixel((0, 0)) == (255, 0, 0)


def test_an_image_that_resizing_would_blow_up_is_too_large() -> None:
    preprocessing = Preprocessing.from_config({"image_processor_type": "BitImageProcessor"})
    with pytest.raises(ImageFault, match="1 × 100000 pixels, 224 × 22400000 when resized"):
        preprocessing.apply(Image.new("RGB", (1, 100_000)))


def test_an_unknown_processor_is_named_with_those_known() -> None:
    with pytest.raises(EncoderError, match=r"'PixtralImageProcessor' is not known here\. One"):
        Preprocessing.from_config({"image_processor_type": "PixtralImageProcessorFast"})


@pytest.mark.parametrize(
    "size", [{"longest_edge": 300}, {"shortest_edge": 2, "longest_edge": 3}, {"height": 3}, "big"]
)
def test_a_size_that_we_do_not_know_is_refused(size: object) -> None:
    with pytest.raises(EncoderError, match=r"The size .* of an image processor is not known here"):
        Preprocessing.from_config({"image_processor_type": "CLIPImageProcessor", "size": size})


@pytest.mark.parametrize(
    "change", [{"resample": 1}, {"do_center_crop": True}, {"do_resize": False}], ids=str
)
def test_dinov3_is_taken_as_it_is_published_or_not_at_all(change: dict[str, object]) -> None:
    with pytest.raises(EncoderError, match="DINOv3ViTImageProcessor"):
        Preprocessing.from_config({"image_processor_type": "DINOv3ViTImageProcessor"} | change)


def test_images_of_different_sizes_must_become_one_size() -> None:
    config = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    with pytest.raises(EncoderError, match="neither crops nor resizes to a fixed size"):
        _ = Preprocessing.from_config(config).output_size


def test_settings_left_out_or_switched_off_do_nothing() -> None:
    config = {
        "feature_extractor_type": "ViTFeatureExtractor",  # the name before transformers 4.26
        "do_rescale": False,
        "do_normalize": False,
        "size": 8,
    }
    preprocessing = Preprocessing.from_config(config)
    pixels = torch.from_numpy(preprocessing.apply(tiny.picture(0)))[None]
    torch.testing.assert_close(preprocessing.normalise(pixels), pixels.float())
    assert preprocessing.as_dict()["resize"] == [8, 8]


def test_fast_decoding_reads_a_jpeg_that_its_strict_decoder_rejects() -> None:
    jpeg = as_jpeg(synthetic(0, 90, 60))
    odd = jpeg[:-2] + b"\0\0junk" + jpeg[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(odd, "RGB", strict=True)
    fast = decode_fast(odd, max_pixels=LIMIT)
    assert np.array_equal(fast, np.asarray(decode(odd, max_pixels=LIMIT)))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_without_its_extra_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    reads_heic.cache_clear()
    with pytest.raises(ImageFault, match="takes the extra `heif`: pip install pillow-heif"):
        decode(HEIC, max_pixels=LIMIT)
    reads_heic.cache_clear()


def test_heic_with_its_extra_is_read_as_the_library_reads_it() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `heif` is not installed")
    assert reads_heic()
    data = tiny.encoded(synthetic(0, 90, 61), "HEIF")
    expected = pillow_heif.open_heif(io.BytesIO(data)).to_pillow().convert("RGB")
    for pixels in (decode(data, max_pixels=LIMIT), decode_fast(data, max_pixels=LIMIT)):
        assert np.array_equal(np.asarray(pixels), np.asarray(expected))
    assert status_of(data[: len(data) // 2]) == Status.TRUNCATED_IMAGE
    assert status_of(data[:30]) == Status.TRUNCATED_IMAGE
    assert status_of(data, max_pixels=100) == Status.IMAGE_TOO_LARGE
