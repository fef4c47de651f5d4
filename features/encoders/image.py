"""Frozen image encoders: any vision model of transformers, with an explicit pooling."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Num
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

from features.config import ImageEncoderConfig
from features.encoders.baselines import BASELINES
from features.encoders.checkpoint import (
    compute_dtype,
    find_encoder,
    load_weights,
    read_config,
    versions,
)
from features.errors import EncoderError
from features.images import Preprocessing

# Two-tower checkpoints: the class that loads the image tower alone.
IMAGE_TOWERS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen image model. Its workers call `preprocessing.apply`, its device `encode`."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    pooling: str
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    dim: int
    fingerprint: dict[str, Any]

    @torch.inference_mode()
    def encode(
        self, pixels: Num[Tensor, "batch 3 height width"]
    ) -> Float32[Tensor, "batch feature_dim"]:
        """Return one vector per image, not normalised, on the device of the model.

        Args:
            pixels: What `preprocessing.apply` gave, stacked; still uint8 in most cases, so that
                little is copied to the device.
        """
        pixels = self.preprocessing.normalise(pixels.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = pool_image(self.model, pixels, self.pooling)
        return features.float()


def load_image_encoder(name: str, config: ImageEncoderConfig, device: torch.device) -> ImageEncoder:
    """Load a frozen image encoder, ready to encode.

    Raises:
        EncoderError: It cannot be found or loaded, or has no such pooling.
    """
    model: Any
    if config.model in BASELINES:
        model, processor = BASELINES[config.model]()
        identity: dict[str, Any] = {"model": config.model}
    else:
        files = find_encoder(config.model, config.revision)
        identity = files.fingerprint()
        processor = _read_processor(files.folder)
        model_config = _without_masking(read_config(files.folder))
        tower = IMAGE_TOWERS.get(model_config.model_type)
        model = load_weights(
            tower or AutoModel,
            files.folder,
            optional="^$" if config.pooling == "pooler" else r"(^|\.)pooler\.",
            config=model_config.vision_config if tower else model_config,
        )
    preprocessing = Preprocessing.from_config(processor)
    dtype = compute_dtype(config.precision, device)
    model = model.to(device)
    dim = _feature_length(model, preprocessing, config.pooling, device)
    fingerprint = identity | {
        "preprocessing": preprocessing.as_dict(),
        "pooling": config.pooling,
        "dtype": str(dtype).removeprefix("torch."),
        "dim": dim,
        "versions": versions("torch", "transformers", "pillow"),
    }
    return ImageEncoder(
        name=name,
        model=model,
        preprocessing=preprocessing,
        pooling=config.pooling,
        batch_size=config.batch_size,
        device=device,
        dtype=dtype,
        dim=dim,
        fingerprint=fingerprint,
    )


def pool_image(
    model: nn.Module, pixels: Float[Tensor, "batch 3 height width"], pooling: str
) -> Float[Tensor, "batch feature_dim"]:
    """Run a vision model and make one vector of its tokens.

    Models differ in how many tokens stand before the patches (none, a class token, registers):
    that is the number of tokens less the number of patches.

    Raises:
        EncoderError: The model has not what the pooling asks for.
    """
    options: dict[str, Any] = {}
    config: Any = model.config
    if getattr(config, "model_type", "") == "vit_mae":
        count = (pixels.shape[-1] // config.patch_size) ** 2
        # MAE orders its tokens by noise even when nothing is masked: rising noise keeps the order.
        options["noise"] = torch.arange(count, device=pixels.device).expand(len(pixels), -1)
    output = model(pixels, **options)
    if pooling == "pooler":
        return _pooler_output(model, output)
    tokens = output.last_hidden_state
    if tokens.ndim == 4:  # a convolutional map: (batch, dim, height, width)
        tokens, prefix = tokens.flatten(2).transpose(1, 2), 0
    else:
        prefix = _prefix_tokens(model, tokens, pixels)
    patches = tokens[:, prefix:]
    if "cls" in pooling and prefix == 0:
        raise EncoderError(
            f"{type(model).__name__} has no class token, so pooling {pooling!r} is not there. "
            f"Use `mean`, `mean+max` or `pooler`."
        )
    parts = {
        "cls": lambda: [tokens[:, 0]],
        "mean": lambda: [patches.mean(1)],
        "cls+mean": lambda: [tokens[:, 0], patches.mean(1)],
        "mean+max": lambda: [patches.mean(1), patches.amax(1)],
    }[pooling]()
    return torch.cat(parts, dim=-1)


def _pooler_output(model: nn.Module, output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise EncoderError(
            f"{type(model).__name__} has no pooler, so pooling 'pooler' is not there. Use `cls`, "
            f"`mean` or `cls+mean`."
        )
    result: Tensor = pooled.flatten(1)
    return result


def _prefix_tokens(model: nn.Module, tokens: Tensor, pixels: Tensor) -> int:
    patch = getattr(model.config, "patch_size", None)
    if not isinstance(patch, int):
        raise EncoderError(
            f"The patches of {type(model).__name__} cannot be told from its other tokens: its "
            f"config has patch_size {patch!r}, not a number. Use pooling `pooler`."
        )
    return int(tokens.shape[1] - (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch))


def _feature_length(
    model: nn.Module, preprocessing: Preprocessing, pooling: str, device: torch.device
) -> int:
    height, width = preprocessing.output_size
    with torch.inference_mode():
        blank = torch.zeros(1, 3, height, width, device=device)
        return int(pool_image(model, blank, pooling).shape[-1])


def _without_masking(config: Any) -> Any:
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0  # MAE drops three quarters of the patches even in evaluation
    return config


def _read_processor(folder: os.PathLike[str]) -> dict[str, Any]:
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
