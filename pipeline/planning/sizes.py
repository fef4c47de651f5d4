"""Sizes of encoders that are not loaded: they are built without weights and run without numbers.

On torch's `meta` device tensors have a shape and nothing else, so that lengths and FLOPs of a model
follow from its code and its config.json alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.baselines import BASELINES
from features.encoders.checkpoint import find_encoder, is_on_hub, read_config, read_settings
from features.encoders.nvembed import NVEmbed
from features.encoders.packing import TokenBatch
from features.encoders.pooling import pool_image
from features.encoders.pretrained import IMAGE_TOWERS, read_image_processor
from features.errors import EncoderError
from features.images import Preprocessing

META = torch.device("meta")
UNFIT = (EncoderError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
"""What a model raises that cannot be built without weights or run without numbers."""

_MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
_DINOV2 = {"small": (12, 384, 6), "base": (12, 768, 12), "large": (24, 1024, 16)}
KNOWN: dict[str, dict[str, Any]] = {
    "sentence-transformers/all-MiniLM-L6-v2": _MINILM,
    "bundled:minilm": _MINILM,
    "nvidia/NV-Embed-v2": {
        "model_type": "nvembed",
        "latent_attention_config": {},
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
    },
    **{
        f"facebook/dinov2-{size}": {
            "model_type": "dinov2",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": 518,
            "patch_size": 14,
        }
        for size, (layers, width, heads) in _DINOV2.items()
    },
}
"""Of released checkpoints, what config.json says of their size; none of them need be here."""
KNOWN_PICTURE = (224, 224)


@dataclass(frozen=True)
class EncoderSize:
    """What is known of an encoder before it is loaded; None where it is not."""

    dims: dict[str, int | None]
    """Length of a feature vector of each column, by its name (image) or of all (text: "")."""
    flops: Callable[[float], float] | None = None
    """FLOPs, forward, of one image, or of one caption of so many tokens."""
    found_in: str = "nothing known"
    """Where the sizes come from."""


def image_size(name: str, settings: ImageEncoderConfig) -> EncoderSize:
    """Return the sizes of an image encoder, without loading it or asking the hub."""
    columns = {name: settings, **settings.also}
    try:
        model, picture, found_in = _image_model(settings)
        pixels = torch.empty(1, 3, *picture, device=META)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            features = pool_image(model, pixels, list(columns.values()))
    except UNFIT:
        return EncoderSize(dict.fromkeys(columns))
    lengths = (int(each.shape[1]) for each in features)
    flops = float(counter.get_total_flops())
    return EncoderSize(dict(zip(columns, lengths, strict=True)), lambda _: flops, found_in)


def text_size(settings: TextEncoderConfig) -> EncoderSize:
    """Return the sizes of a text encoder, without loading it or asking the hub."""
    try:
        model, folder = build_model(settings.model, settings.revision)
        _caption_flops(model, 1)
    except UNFIT:
        return EncoderSize({"": None})
    config: Any = model.trunk.config if isinstance(model, NVEmbed) else model.config
    found_in = "its config.json" if folder else "known configuration"
    return EncoderSize(
        {"": int(config.hidden_size)},
        lambda tokens: _caption_flops(model, max(1, round(tokens))),
        found_in,
    )


@functools.cache
def build_model(model: str, revision: str | None) -> tuple[nn.Module, Path | None]:
    """Return an encoder without weights, and the folder of its files unless it is known.

    Raises:
        EncoderError: It is neither known nor here, or no model of transformers.
    """
    settings, folder = KNOWN.get(model), None
    if settings is None:
        folder = local_folder(model, revision)
        if folder is None:
            raise EncoderError(
                f"{model} is not on this machine, so its size is not known. Download it, or name a "
                f"folder that holds it."
            )
        settings = read_settings(folder)
    with META:
        if settings.get("model_type") == "nvembed":
            embedder = NVEmbed(settings)
            embedder.latent.prepare()
            return embedder.eval(), folder
        config = read_config(folder) if folder else AutoConfig.for_model(**settings)
        tower = IMAGE_TOWERS.get(config.model_type)
        built = tower(config.vision_config) if tower else AutoModel.from_config(config)
        return built.eval(), folder


def _image_model(settings: ImageEncoderConfig) -> tuple[nn.Module, tuple[int, int], str]:
    """Return a model without weights, the pixels of its pictures, and where these are from."""
    if settings.model in BASELINES:
        model, processor = BASELINES[settings.model]()
        return model.to(META), Preprocessing.from_config(processor).output_size, "its code"
    model, folder = build_model(settings.model, settings.revision)
    if folder is None:
        return model, KNOWN_PICTURE, "known configuration"
    processor = read_image_processor(folder)
    return model, Preprocessing.from_config(processor).output_size, "its config.json"


@functools.cache
def _caption_flops(model: nn.Module, tokens: int) -> float:
    batch = TokenBatch.pack([[0] * tokens], META)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(batch) if isinstance(model, NVEmbed) else model(input_ids=batch.ids[None])
    return float(counter.get_total_flops())


def local_folder(model: str, revision: str | None) -> Path | None:
    """Return where the files of a checkpoint are on this machine; the hub is not asked."""
    try:
        if not is_on_hub(model):
            return find_encoder(model, revision, weights=False).folder
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except (EncoderError, HFValidationError):  # not here, or not the form of a hub id
        return None
    return Path(found).parent if isinstance(found, str) else None
