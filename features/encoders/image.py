"""Frozen image encoders: any vision model of transformers, with an explicit pooling."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Num
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

from features.config import ImageColumnConfig, ImageEncoderConfig
from features.encoders.baselines import BASELINES
from features.encoders.checkpoint import (
    compute_dtype,
    find_encoder,
    load_weights,
    read_config,
    versions,
)
from features.encoders.compiled import CompiledForward, Forward, check_compiles
from features.encoders.pooling import pool_image
from features.encoders.positions import fix_position_tables
from features.errors import EncoderError
from features.fast_images import check_can_be_fast, prepare_fast
from features.images import Preprocessing, decode

# Two-tower checkpoints: the class that loads the image tower alone.
IMAGE_TOWERS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


@dataclass(frozen=True)
class ImageColumn:
    """One column that an encoder fills: its features of one layer, pooled in one way."""

    name: str
    settings: ImageColumnConfig
    dim: int
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen image model. Its workers call `prepare`, its device `encode`."""

    name: str
    model: nn.Module
    forward: Forward
    """From pixels on the device to one tensor of features for each pooling."""
    preprocessing: Preprocessing
    mode: str
    upright: bool
    """Whether pictures are turned as their EXIF orientation says."""
    dtype: torch.dtype
    """What the model computes in."""
    batch_size: int
    device: torch.device
    columns: tuple[ImageColumn, ...]
    """The encoder's own column, then those of `also`."""
    has_fixed_batch: bool = False
    """Whether a batch of another size would mean to compile anew."""

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What decides the features of each column, by its name in the store."""
        return {f"image/{column.name}": column.fingerprint for column in self.columns}

    def prepare(self, data: bytes, *, max_pixels: int) -> Num[np.ndarray, "3 height width"]:
        """Decode, resize and crop an encoded image, as the checkpoint asks.

        Raises:
            ImageFault: It cannot be used; see `features.images.decode`.
        """
        if self.mode == "fast":
            return prepare_fast(
                data, self.preprocessing, max_pixels=max_pixels, upright=self.upright
            )
        return self.preprocessing.apply(decode(data, max_pixels=max_pixels, upright=self.upright))

    def room_for(self, images: int) -> Num[Tensor, "images 3 height width"]:
        """Return memory for what `prepare` gives, from which the device can copy by itself."""
        is_float = self.preprocessing.in_float and self.mode == "exact"
        shape = (images, 3, *self.preprocessing.output_size)
        dtype = torch.float32 if is_float else torch.uint8
        if self.device.type != "cuda":
            return torch.empty(shape, dtype=dtype)
        with torch.cuda.device(self.device):
            return torch.empty(shape, dtype=dtype, pin_memory=True)

    @torch.inference_mode()
    def encode(
        self,
        pixels: Num[Tensor, "batch 3 height width"],
        columns: Sequence[ImageColumn] | None = None,
        *,
        batch_size: int | None = None,
    ) -> list[Float32[Tensor, "batch _"]]:
        """Return one vector per image for each column, not normalised, on the device of the model.

        Args:
            pixels: What `prepare` gave; still uint8 in most cases, so that little is copied to the
                device.
            columns: Those that are wanted; all if not given.
            batch_size: What a compiled model pads its batch to; the encoder's own if not given.
        """
        count = len(pixels)
        pixels = pixels.to(self.device, non_blocking=True)
        if self.has_fixed_batch and (missing := (batch_size or self.batch_size) - count) > 0:
            pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        wanted = [column.settings for column in columns or self.columns]
        return [features[:count] for features in self.forward(pixels, wanted)]


def load_image_encoder(name: str, config: ImageEncoderConfig, device: torch.device) -> ImageEncoder:
    """Load a frozen image encoder, ready to encode.

    Raises:
        EncoderError: It cannot be found, loaded or compiled, or has no such pooling or layer.
    """
    own = ImageColumnConfig(pooling=config.pooling, layer=config.layer)
    settings = {name: own, **config.also}
    model, processor, identity = _load(config, pooler=_wants_pooler(settings.values()))
    preprocessing = Preprocessing.from_config(processor)
    if config.mode == "fast":
        check_can_be_fast(preprocessing)
    dtype = compute_dtype(config.precision, device)
    model = model.to(device)

    normalise = preprocessing.normaliser(device)

    def forward(pixels: Tensor, wanted: Sequence[ImageColumnConfig]) -> list[Tensor]:
        pixels = normalise(pixels)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return [features.float() for features in pool_image(model, pixels, wanted)]

    blank = torch.zeros(1, 3, *preprocessing.output_size, device=device, dtype=torch.uint8)
    with torch.inference_mode():
        fix_position_tables(model, lambda: forward(blank, [own]))
        dims = [features.shape[1] for features in forward(blank, list(settings.values()))]
    packages = ["torch", "transformers", "pillow"]
    identity |= {
        "preprocessing": preprocessing.as_dict(),
        "mode": config.mode,
        "upright": config.upright,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(*packages, *(["simplejpeg"] if config.mode == "fast" else [])),
    }
    encoder = ImageEncoder(
        name=name,
        model=model,
        forward=forward,
        preprocessing=preprocessing,
        mode=config.mode,
        upright=config.upright,
        dtype=dtype,
        batch_size=config.batch_size,
        device=device,
        columns=tuple(
            _column(column, each, dim, identity)
            for (column, each), dim in zip(settings.items(), dims, strict=True)
        ),
    )
    if config.compile:
        encoder = replace(encoder, forward=CompiledForward(forward), has_fixed_batch=True)
        check_compiles(name, lambda: encoder.encode(blank))
    return encoder


def _column(
    name: str, settings: ImageColumnConfig, dim: int, identity: dict[str, Any]
) -> ImageColumn:
    of_column = {"pooling": settings.pooling, "layer": settings.layer, "dim": dim}
    return ImageColumn(name, settings, dim, identity | of_column)


def _wants_pooler(settings: Iterable[ImageColumnConfig]) -> bool:
    return any(each.pooling == "pooler" for each in settings)


def _load(
    config: ImageEncoderConfig, *, pooler: bool
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Return the model, the settings of its image processor, and what identifies it."""
    if config.model in BASELINES:
        model, processor = BASELINES[config.model]()
        return model, processor, {"model": config.model}
    files = find_encoder(config.model, config.revision)
    processor = read_image_processor(files.folder)
    model_config = _without_masking(read_config(files.folder))
    tower = IMAGE_TOWERS.get(model_config.model_type)
    loaded = load_weights(
        tower or AutoModel,
        files.folder,
        optional="^$" if pooler else r"(^|\.)pooler\.",
        config=model_config.vision_config if tower else model_config,
    )
    return loaded, processor, files.fingerprint()


def _without_masking(config: Any) -> Any:
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0  # MAE drops three quarters of the patches even in evaluation
    return config


def read_image_processor(folder: os.PathLike[str]) -> dict[str, Any]:
    """Return the settings of a checkpoint's own image processor.

    Raises:
        EncoderError: They are missing, or no JSON.
    """
    path = os.path.join(folder, "preprocessor_config.json")  # noqa: PTH118
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            processor: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"{path} cannot be read ({error}). The checkpoint's own preprocessing was expected "
            f"there. Fetch the file from where the weights came from."
        ) from error
    return processor
