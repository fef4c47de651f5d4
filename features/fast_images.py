"""The fast way from a JPEG to pixels: libjpeg-turbo without Pillow, and torch's uint8 resize.

What is no ordinary JPEG, and what is damaged in any way, goes through Pillow, so that the same
files are quarantined for the same reasons. Pixels are decoded to the same bits. The resize rounds
its weights to 16 bits and Pillow to 22: about 0.3 % of the values of a photograph come out one grey
level apart, and some in a million two (tests/parity/test_fast_images.py).
"""

import numpy as np
import PIL
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image
from torch.nn import functional as F

from features.errors import EncoderError
from features.images import Preprocessing, as_rgb, open_image, turn_of
from features.processors import BICUBIC, BILINEAR

FILTERS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}
VERTICAL_FIRST_SINCE = 13  # version of Pillow


def check_can_be_fast(preprocessing: Preprocessing) -> None:
    """Refuse a preprocessing whose filter torch does not have for uint8.

    Raises:
        EncoderError: Naming the filter.
    """
    resizes = preprocessing.resize is not None or preprocessing.shortest_edge is not None
    if resizes and preprocessing.resample not in FILTERS:
        raise EncoderError(
            f"mode = 'fast' is not there for {preprocessing.processor} with the filter "
            f"{preprocessing.resample}. 2 (bilinear) or 3 (bicubic) was expected. Set mode = "
            f"'exact'."
        )


def prepare_fast(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int, upright: bool = False
) -> UInt8[np.ndarray, "3 height width"]:
    """Decode, resize and crop an encoded image.

    Args:
        data: The file's bytes.
        preprocessing: What the checkpoint asks for; `in_float` is not followed, the result is
            uint8 always.
        max_pixels: Width times height that is still decoded.
        upright: Whether it is turned as its EXIF orientation says.

    Raises:
        ImageFault: As by `features.images.decode`, and for the same files.
    """
    pixels = decode_fast(data, max_pixels=max_pixels, upright=upright)
    size = preprocessing.resized((pixels.shape[1], pixels.shape[0]))
    if size is not None:
        pixels = _resize(pixels, size, FILTERS[preprocessing.resample])
    return preprocessing.cropped(pixels)


def decode_fast(
    data: bytes, *, max_pixels: int, upright: bool = False
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an encoded image to the pixels that `features.images.decode` gives.

    Raises:
        ImageFault: As by that, and for the same files.
    """
    image = open_image(data, max_pixels=max_pixels)
    pixels = _pixels(image, data)
    turn = turn_of(image) if upright else None
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _pixels(image: Image.Image, data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        try:
            if simplejpeg.decode_jpeg_header(data)[:2] == (image.height, image.width):
                return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
        except ValueError:  # damaged, or of a kind it does not know: Pillow says what of it
            pass
    return np.asarray(as_rgb(image))


def _resize(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int], filter_name: str
) -> UInt8[np.ndarray, "resized_height resized_width 3"]:
    """Resize in the order of Pillow's two passes, since each rounds to whole grey levels."""
    width, height = size
    steps = [(height, width)]
    if _vertical_first(pixels.shape[:2], (height, width)):
        steps = [(height, pixels.shape[1]), (height, width)]
    tensor = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    tensor = tensor.permute(2, 0, 1)[None]
    for step in steps:
        if tuple(tensor.shape[2:]) != step:
            tensor = F.interpolate(tensor, step, mode=filter_name, antialias=True)
    return tensor[0].permute(1, 2, 0).numpy()


def _vertical_first(old: tuple[int, ...], new: tuple[int, int]) -> bool:
    """Return whether Pillow resizes the height before the width: where it shrinks much more."""
    shrinks_by = old[0] - new[0], old[1] - new[1]
    is_new = int(PIL.__version__.split(".")[0]) >= VERTICAL_FIRST_SINCE
    return is_new and shrinks_by[0] > 0 and shrinks_by[0] > 2 * shrinks_by[1]
