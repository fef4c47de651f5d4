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
import PIL
import simplejpeg
import torch
from jaxtyping import Float, Num, UInt8
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F

from features.errors import EncoderError
from features.status import Status

BICUBIC = int(Image.Resampling.BICUBIC)
BILINEAR = int(Image.Resampling.BILINEAR)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _defaults(
    size: int | dict[str, int],
    resample: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop: int | None = None,
) -> dict[str, Any]:
    crops = {} if crop is None else {"crop_size": {"height": crop, "width": crop}}
    return crops | {
        "do_resize": True,
        "do_center_crop": crop is not None,
        "resample": resample,
        "size": {"height": size, "width": size} if isinstance(size, int) else size,
        "image_mean": mean,
        "image_std": std,
    }


# What each processor of transformers does where preprocessor_config.json leaves a key out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _defaults(224, BILINEAR, HALF, HALF),
    "BitImageProcessor": _defaults({"shortest_edge": 224}, BICUBIC, CLIP_MEAN, CLIP_STD, 224),
    "CLIPImageProcessor": _defaults({"shortest_edge": 224}, BICUBIC, CLIP_MEAN, CLIP_STD, 224),
    "SiglipImageProcessor": _defaults(224, BICUBIC, HALF, HALF),
    "MobileNetV2ImageProcessor": _defaults({"shortest_edge": 256}, BILINEAR, HALF, HALF, 224),
    "DeiTImageProcessor": _defaults(256, BICUBIC, HALF, HALF, 224),
    "ConvNextImageProcessor": _defaults({"shortest_edge": 384}, BICUBIC, HALF, HALF)
    | {"crop_pct": 224 / 256},
    "DINOv3ViTImageProcessor": _defaults(224, BILINEAR, IMAGENET_MEAN, IMAGENET_STD),
}
SUFFIXES = ("Fast", "Pil")
CONVNEXT_STRETCHES_FROM = 384


def read_processor(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `features.images.Preprocessing` from a preprocessor_config.json.

    Raises:
        EncoderError: The processor, its filter or its size is not one we know.
    """
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    name = name.replace("FeatureExtractor", "ImageProcessor")
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    if name not in DEFAULTS:
        raise EncoderError(
            f"The image processor {name!r} is not known here. One of {', '.join(DEFAULTS)} was "
            f"expected. Choose another encoder, or write its preprocessor_config.json as one "
            f"of these."
        )
    merged = DEFAULTS[name] | {key: value for key, value in config.items() if value is not None}
    in_float = name.startswith("DINOv3")
    if in_float:
        _check_can_resize_in_float(merged)
    square = "height" in DEFAULTS[name]["size"]
    resize, shortest_edge, crop = _geometry(merged, square=square)
    rescales, normalises = merged.get("do_rescale", True), merged.get("do_normalize", True)
    return {
        "processor": name,
        "resize": resize,
        "shortest_edge": shortest_edge,
        "crop": crop,
        "resample": int(merged["resample"]),
        "rescale": float(merged.get("rescale_factor", 1 / 255)) if rescales else 1.0,
        "mean": _three(merged["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        "std": _three(merged["image_std"]) if normalises else (1.0, 1.0, 1.0),
        "in_float": in_float,
    }


def _geometry(
    config: dict[str, Any], *, square: bool
) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """Return what to resize to (height and width, or the shorter side), and what to crop."""
    crop = _size(config.get("crop_size"), square=True)[0] if config["do_center_crop"] else None
    if not config["do_resize"]:
        return None, None, crop
    resize, shortest_edge = _size(config["size"], square=square)
    if "crop_pct" not in config or shortest_edge is None:
        return resize, shortest_edge, crop
    target = (shortest_edge, shortest_edge)
    if shortest_edge >= CONVNEXT_STRETCHES_FROM:
        return target, None, crop
    return None, int(shortest_edge / config["crop_pct"]), target


def _size(size: Any, *, square: bool) -> tuple[tuple[int, int] | None, int | None]:
    """Return (height, width), or the shorter side, from what a config calls a size.

    A number alone is a square for some processors and the shorter side for others.
    """
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    size = size if isinstance(size, dict) else {}
    given = {name: value for name, value in size.items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return None, int(given["shortest_edge"])
    if given.keys() == {"height", "width"}:
        return (int(given["height"]), int(given["width"])), None
    raise EncoderError(
        f"The size {size!r} of an image processor is not known here. `height` and `width`, or "
        f"`shortest_edge`, was expected. Choose another encoder."
    )


def _three(values: Any) -> tuple[float, float, float]:
    """Return one value for each channel from a number or three."""
    red, green, blue = [values] * 3 if isinstance(values, (int, float)) else values
    return float(red), float(green), float(blue)


def _check_can_resize_in_float(config: dict[str, Any]) -> None:
    if config["resample"] not in (BILINEAR, BICUBIC):
        raise EncoderError(
            f"The filter {config['resample']} of DINOv3ViTImageProcessor is not known here. 2 "
            f"(bilinear) or 3 (bicubic) was expected. Choose another encoder."
        )
    if config["do_center_crop"] or not config["do_resize"]:
        raise EncoderError(
            "DINOv3ViTImageProcessor here crops, or does not resize. Resizing to a fixed size and "
            "no crop was expected, as in Meta's checkpoints. Choose another encoder."
        )


# Our own limit is checked before any pixel is decoded; Pillow's would warn, and is global.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of odd metadata, which no pixel depends on. Once and for all, since the filters
# belong to the whole process: `catch_warnings` around each image would let threads mix them up.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Only these are opened. Others of Pillow's are not of photographs, or start a program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "JPEG2000", "AVIF", "HEIF")
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
# Modes of numbers that need not fit 8 bits.
WIDE_MODES = frozenset({"F", "I", "I;16", "I;16L", "I;16B", "I;16N"})
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
        reason = _not_read(data) or "it is no image that can be read"
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
        ImageFault: They end too early or are damaged, or are numbers beyond those of 8 bits.
    """
    try:
        if image.mode in WIDE_MODES:
            _check_range(image)
        return image.convert("RGB")
    except DECODER_ERRORS as error:
        raise ImageFault(Status.TRUNCATED_IMAGE, _reason(error)) from error


def _check_range(image: Image.Image) -> None:
    """Refuse numbers that Pillow would clip or round to nothing: all white, or all black."""
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    is_fraction = image.mode == "F" and 0 < most <= 1
    if is_fraction or not 0 <= least <= most <= 255:  # nor where one is not a number
        raise ImageFault(
            Status.NOT_AN_IMAGE,
            f"its values go from {least:g} to {most:g} (mode {image.mode}), and 0 to 255 were "
            f"expected: scale them to 8 bits",
        )


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


def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that are read here."""
    return _formats_of_pillow(reads_heic())


@functools.cache
def _formats_of_pillow(with_heic: bool) -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN and (with_heic or name != "HEIF"))


def _begins_as_image(data: bytes) -> bool:
    is_heic = data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS and reads_heic()
    return data.startswith(SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP") or is_heic


@functools.cache
def reads_heic() -> bool:
    """Return whether HEIC, as iPhones write it, is read: by the extra `heif`."""
    try:
        import pillow_heif  # the extra
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _not_read(data: bytes) -> str:
    """Say what is needed for a format that this installation does not read."""
    if data[4:8] != b"ftyp":
        return ""
    if data[8:12] in HEIC_BRANDS and not reads_heic():
        return "it is HEIC, which takes the extra `heif`: pip install pillow-heif"
    if data[8:12] in (b"avif", b"avis") and "AVIF" not in _formats():
        return "it is AVIF, which this build of Pillow does not read: pip install 'pillow>=11.3'"
    return ""


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
    if isinstance(error, PIL.UnidentifiedImageError):  # it says an address in memory
        return "its header is damaged"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


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
