"""Decodes images safely, and prepares them as an encoder's checkpoint asks, without torchvision.

The pixels equal those of the Pillow processors of transformers: see tests/parity/test_images.py.
"""

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F

from features.errors import EncoderError
from features.processors import BILINEAR, read_processor
from features.status import Status

# Our own limit is checked before any pixel is decoded; Pillow's would warn, and is global.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of odd metadata, which no pixel depends on. Once and for all, since the filters
# belong to the whole process: `catch_warnings` around each image would let threads mix them up.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Only these are opened. Others of Pillow's are not of photographs, or start a program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "JPEG2000", "AVIF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
# What Pillow's decoders raise when bytes are not what they should be.
DECODER_ERRORS = (
    OSError,  # with UnidentifiedImageError
    SyntaxError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # with NotImplementedError
    struct.error,
    zlib.error,
)
# How a picture is brought upright, by its orientation in EXIF; 1 is upright.
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# An image of one pixel's width, resized by its shorter side, could take all memory there is.
MAX_RESIZED_PIXELS = 1 << 26


class ImageFault(Exception):  # noqa: N818 - the row is quarantined; nothing goes wrong
    """An image that cannot be used, and why."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def decode(data: bytes, *, max_pixels: int, upright: bool = False) -> Image.Image:
    """Decode an encoded image to RGB, exactly as the Hugging Face processors see it.

    Greyscale, palette, 16-bit, CMYK and alpha are converted by Pillow's `convert("RGB")`. The
    content decides, not the file's name; of an animation the first frame is taken.

    Args:
        data: The file's bytes.
        max_pixels: Width times height that is still decoded.
        upright: Whether it is turned as its EXIF orientation says, which theirs do not.

    Raises:
        ImageFault: There are no bytes, they are no image, they end too early or are damaged, or
            the image has more than `max_pixels` pixels (checked before anything is decoded).
    """
    image = open_image(data, max_pixels=max_pixels)
    rgb = as_rgb(image)
    return turned(rgb, image) if upright else rgb


def open_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Read the header of an encoded image; its pixels are not decoded yet.

    Raises:
        ImageFault: See `decode`.
    """
    if not data:
        raise ImageFault(Status.EMPTY_IMAGE, "it has no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except DECODER_ERRORS as error:
        if _begins_as_image(data):
            reason = f"it begins as an image, but cannot be read ({_reason(error)})"
            raise ImageFault(Status.TRUNCATED_IMAGE, reason) from error
        heic = "it is HEIC, which is not read: convert it to JPEG"
        reason = heic if _is_heic(data) else "it is no image that can be read"
        raise ImageFault(Status.NOT_AN_IMAGE, reason) from error
    pixels = image.width * image.height
    if pixels == 0:
        raise ImageFault(Status.NOT_AN_IMAGE, "it has no pixels")
    if pixels > max_pixels:
        size = f"{image.width} × {image.height} pixels, more than {max_pixels}"
        raise ImageFault(Status.IMAGE_TOO_LARGE, size)
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Decode the pixels of an image that was opened.

    Raises:
        ImageFault: They end too early or are damaged.
    """
    try:
        return image.convert("RGB")
    except DECODER_ERRORS as error:
        raise ImageFault(Status.TRUNCATED_IMAGE, _reason(error)) from error


def cut_out(data: bytes, box: Sequence[int], *, max_pixels: int) -> bytes:
    """Return a part of an encoded image as an image file (PPM), black beyond its borders.

    What cannot be decoded comes back as it is: whoever decodes it says why.

    Args:
        data: The file's bytes.
        box: Left, top, right and bottom in pixels.
        max_pixels: Width times height that is still decoded.
    """
    try:
        part = decode(data, max_pixels=max_pixels).crop((box[0], box[1], box[2], box[3]))
    except ImageFault:
        return data
    return f"P6 {part.width} {part.height} 255\n".encode() + part.tobytes()


def turned(pixels: Image.Image, opened: Image.Image) -> Image.Image:
    """Return a decoded picture turned as the EXIF orientation of its file says, if it says any."""
    turn = turn_of(opened)
    return pixels if turn is None else pixels.transpose(turn)


def turn_of(opened: Image.Image) -> Image.Transpose | None:
    """Return what brings the pixels of a file upright, or None where nothing is to be done.

    Ask when they are decoded: a TIFF is turned by Pillow then, and says so.
    """
    try:
        return TURNS.get(opened.getexif().get(ExifTags.Base.Orientation))
    except DECODER_ERRORS:  # EXIF data that cannot be read turn nothing
        return None


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise, as read from a preprocessor_config.json."""

    processor: str
    resize: tuple[int, int] | None
    """Height and width that the image is stretched to."""
    shortest_edge: int | None
    """Or: the length of its shorter side, keeping its shape."""
    crop: tuple[int, int] | None
    """Height and width that are cut from the middle."""
    resample: int
    """Pillow's number of the filter."""
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_float: bool = False
    """DINOv3 rescales first and resizes in float32, with torch's antialiased filter. The result is
    then float32 and rescaled already, where it is otherwise uint8."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Preprocessing":
        """Read the settings of a processor; those left out have that processor's defaults.

        Raises:
            EncoderError: The processor, its filter or its size is not one we know.
        """
        return cls(**read_processor(config))

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of what the encoder gets.

        Raises:
            EncoderError: It would differ from image to image, so that none could share a batch.
        """
        size = self.crop or self.resize
        if size is None:
            raise EncoderError(
                f"{self.processor} here neither crops nor resizes to a fixed size. One was "
                f"expected. Set `do_center_crop` or a height and width in preprocessor_config.json."
            )
        return size

    def apply(self, image: Image.Image) -> Num[np.ndarray, "3 height width"]:
        """Resize and crop an RGB image; uint8, or float32 in [0, 1] when `in_float`.

        Raises:
            ImageFault: The image is so long and thin that it would grow beyond all measure.
        """
        if self.in_float:
            return self._resize_in_float(np.asarray(image))
        size = self.resized(image.size)
        if size is not None:
            image = image.resize(size, self.resample, reducing_gap=None)
        return self.cropped(np.asarray(image))

    def resized(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Return the width and height that an image of a width and height is resized to, if at all.

        Raises:
            ImageFault: It is so long and thin that it would grow beyond all measure.
        """
        if self.resize is not None:
            return self.resize[1], self.resize[0]
        if self.shortest_edge is None:
            return None
        width, height = _fit(size, self.shortest_edge)
        if width * height > MAX_RESIZED_PIXELS:
            what = f"{size[0]} × {size[1]} pixels, {width} × {height} when resized"
            raise ImageFault(Status.IMAGE_TOO_LARGE, what)
        return width, height

    def cropped(
        self, pixels: UInt8[np.ndarray, "resized_height resized_width 3"]
    ) -> UInt8[np.ndarray, "3 height width"]:
        """Cut the middle of a resized image, if a crop is asked for."""
        if self.crop is not None:
            pixels = _center_crop(pixels, *self.crop)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def normalise(
        self, pixels: Num[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Rescale and standardise a batch, on the device it is on."""
        return self.normaliser(pixels.device)(pixels)

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return what rescales and standardises batches on a device, to which it copies no more."""
        mean = torch.tensor(self.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=device).view(1, 3, 1, 1)

        def normalise(pixels: Tensor) -> Tensor:
            scale = 1.0 if pixels.is_floating_point() else self.rescale
            return (pixels.float() * scale - mean) / std

        return normalise

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for the fingerprint of a column."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def _resize_in_float(self, pixels: np.ndarray) -> Float[np.ndarray, "3 height width"]:
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() * self.rescale
        mode = "bilinear" if self.resample == BILINEAR else "bicubic"
        resized = F.interpolate(tensor, self.output_size, mode=mode, antialias=True)
        return np.asarray(resized[0].numpy())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _begins_as_image(data: bytes) -> bool:
    return data.startswith(SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1")


def _fit(size: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    """Return (width, height) with the given shorter side; the longer is rounded down."""
    width, height = size
    if width <= height:
        return shortest_edge, int(shortest_edge * height / width)
    return int(shortest_edge * width / height), shortest_edge


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut the middle; where the image is smaller, black is added around it."""
    rows, columns = pixels.shape[:2]
    if rows < height or columns < width:
        padded = np.zeros((max(rows, height), max(columns, width), 3), dtype=pixels.dtype)
        top, left = -(-(len(padded) - rows) // 2), -(-(padded.shape[1] - columns) // 2)
        padded[top : top + rows, left : left + columns] = pixels
        pixels = padded
        rows, columns = pixels.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
