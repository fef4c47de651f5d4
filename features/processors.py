"""The image processors of transformers, as plain numbers: what to resize to, crop, and subtract.

Source: `image_processing_pil_*.py` of transformers 5.23 (for DINOv3 `image_processing_*.py`).
"""

from typing import Any

from PIL import Image

from features.errors import EncoderError

BICUBIC = int(Image.Resampling.BICUBIC)
BILINEAR = int(Image.Resampling.BILINEAR)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What each processor of transformers does where preprocessor_config.json leaves a key out.
_SQUARE = {"do_resize": True, "do_center_crop": False, "resample": BILINEAR}
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _SQUARE
    | {"size": {"height": 224, "width": 224}, "image_mean": HALF, "image_std": HALF},
    "BitImageProcessor": {
        "do_resize": True,
        "do_center_crop": True,
        "resample": BICUBIC,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    "CLIPImageProcessor": {
        "do_resize": True,
        "do_center_crop": True,
        "resample": BICUBIC,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    "SiglipImageProcessor": _SQUARE
    | {
        "resample": BICUBIC,
        "size": {"height": 224, "width": 224},
        "image_mean": HALF,
        "image_std": HALF,
    },
    "MobileNetV2ImageProcessor": {
        "do_resize": True,
        "do_center_crop": True,
        "resample": BILINEAR,
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": HALF,
        "image_std": HALF,
    },
    "DeiTImageProcessor": _SQUARE
    | {
        "do_center_crop": True,
        "resample": BICUBIC,
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": HALF,
        "image_std": HALF,
    },
    "ConvNextImageProcessor": _SQUARE
    | {
        "resample": BICUBIC,
        "size": {"shortest_edge": 384},
        "crop_pct": 224 / 256,
        "image_mean": HALF,
        "image_std": HALF,
    },
    "DINOv3ViTImageProcessor": _SQUARE
    | {
        "size": {"height": 224, "width": 224},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    },
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
