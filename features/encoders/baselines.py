"""Baselines that nobody trained: the pixels themselves, and a network of random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.checkpoint import EncoderFiles
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.text import TextEncoder
from features.errors import EncoderError
from features.images import Preprocessing

IMAGES = "`baseline:pixels` (the image at 32 × 32) or `baseline:random-vit` (untrained weights)"
TEXTS = None
PIXELS = "baseline:pixels"
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclass(frozen=True)
class _Output:
    pooler_output: Tensor
    last_hidden_state: Tensor


class _Pixels(nn.Module):
    """The image itself, 32 × 32 in three colours, as 3072 features."""

    config = None

    def forward(self, pixels: Tensor) -> _Output:
        small = F.adaptive_avg_pool2d(pixels, 32)
        return _Output(pooler_output=small.flatten(1), last_hidden_state=small)


def _pixels() -> tuple[nn.Module, dict[str, Any]]:
    return _Pixels(), PREPROCESSING | {"size": {"height": 32, "width": 32}}


def _random_vit() -> tuple[nn.Module, dict[str, Any]]:
    """Return a vision transformer that was never trained: what architecture alone gives."""
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=64,
        patch_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = ViTModel(config, add_pooling_layer=False)
    processor = PREPROCESSING | {"size": {"height": 64, "width": 64}}
    return model.eval().requires_grad_(False), processor


BASELINES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    PIXELS: _pixels,
    "baseline:random-vit": _random_vit,
}


def find(model: str, revision: str | None, *, weights: bool = True) -> EncoderFiles | None:  # noqa: ARG001
    """Return None: a baseline has no files."""
    return None


def is_here(model: str, revision: str | None) -> bool:  # noqa: ARG001
    """Return whether there is such a baseline."""
    return model in BASELINES


def missing(model: str) -> tuple[bool, str, str]:
    """Say that there is no such baseline."""
    return False, f"there is no {model}", f"correct `model`: {', '.join(BASELINES)}"


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Decide how a baseline is used.

    Raises:
        EncoderError: There is none of that name, or it reads captions.
    """
    if not isinstance(config, ImageEncoderConfig):
        raise _no_text(config)
    _, preprocessing, _ = load_image(config, frozenset())
    own = "pooler" if config.model == PIXELS else "cls"
    made = PlanBuilder()
    made.decide("pooling", config.pooling, Decision(own, "its code"))
    for name, column in config.also.items():
        made.decide(f"pooling of {name}", column.pooling, Decision(own, "its code"))
    height, width = preprocessing.output_size
    made.decisions["size"] = Decision(f"{height} × {width}", "its code")
    return EncoderPlan("image", config.model, made.decisions)


def load_image(
    config: ImageEncoderConfig,
    poolings: frozenset[str],  # noqa: ARG001 - both have what is asked of them
) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """Return a baseline, what prepares its pictures, and what identifies it.

    Raises:
        EncoderError: There is none of that name.
    """
    if config.model not in BASELINES:
        raise EncoderError(
            f"There is no baseline {config.model!r}. One of {', '.join(BASELINES)} was expected. "
            f"Correct `model`."
        )
    model, processor = BASELINES[config.model]()
    return model, Preprocessing.from_config(processor), {"model": config.model}


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:  # noqa: ARG001
    """Refuse: no baseline reads captions."""
    raise _no_text(config)


def _no_text(config: TextEncoderConfig) -> EncoderError:
    return EncoderError(
        f"{config.model!r} is a baseline of images, but a text encoder names it. A model of texts "
        f"was expected. Choose another."
    )
