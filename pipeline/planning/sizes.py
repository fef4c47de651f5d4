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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from features.config import ImageColumnConfig, ImageEncoderConfig, TextEncoderConfig
from features.encoders import resolve
from features.encoders.baselines import BASELINES
from features.encoders.checkpoint import local_folder, read_config, read_settings
from features.encoders.image_plan import decide_poolings, image_config
from features.encoders.nvembed import NVEmbed
from features.encoders.packing import TokenBatch
from features.encoders.plan import Decision, PlanBuilder
from features.encoders.pooling import pool_image
from features.encoders.processors import make_preprocessing, read_image_processor
from features.encoders.towers import IMAGE_TOWERS
from features.errors import EncoderError
from features.images import Preprocessing

META = torch.device("meta")
NOTHING = Decision(None, "")
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
        wanted = _pooled_columns(settings, model)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            features = pool_image(model, pixels, wanted)
    except UNFIT:
        return EncoderSize(dict.fromkeys(columns))
    lengths = (int(each.shape[1]) for each in features)
    flops = float(counter.get_total_flops())
    return EncoderSize(dict(zip(columns, lengths, strict=True)), lambda _: flops, found_in)


def _pooled_columns(settings: ImageEncoderConfig, model: nn.Module) -> list[ImageColumnConfig]:
    """Return the columns of an encoder with the pooling that each will have."""
    decided: dict[str, Any] = {}
    if settings.model in KNOWN and local_folder(settings.model, settings.revision) is None:
        made = PlanBuilder()
        decide_poolings(made, settings, model.config)
        decided = made.decisions
    else:
        decided = dict(resolve(settings).decisions)
    own = {"pooling": settings} | {f"pooling of {each}": c for each, c in settings.also.items()}
    return [
        ImageColumnConfig(pooling=decided[place].value, layer=column.layer)
        for place, column in own.items()
    ]


def text_size(settings: TextEncoderConfig) -> EncoderSize:
    """Return the sizes of a text encoder, without loading it or asking the hub."""
    try:
        model, folder = build_model(settings.model, settings.revision)
        _caption_flops(model, 1)
        plan = resolve(settings) if folder else None
    except UNFIT:
        return EncoderSize({"": None})
    if plan is not None and (plan.decisions.get("behind", NOTHING).value or "+" in plan["pooling"]):
        return EncoderSize({"": None})  # its Dense layers say how long it is
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
        own = image_config(model, config) if tower else config
        built = tower.plain(own) if tower else AutoModel.from_config(config)
        return built.eval(), folder


def _image_model(settings: ImageEncoderConfig) -> tuple[nn.Module, tuple[int, int], str]:
    """Return a model without weights, the pixels of its pictures, and where these are from."""
    if settings.model in BASELINES:
        model, processor = BASELINES[settings.model]()
        return model.to(META), Preprocessing.from_config(processor).output_size, "its code"
    model, folder = build_model(settings.model, settings.revision)
    if folder is None:
        return model, KNOWN_PICTURE, "known configuration"
    preprocessing = make_preprocessing(folder, read_image_processor(folder))
    return model, preprocessing.output_size, "its config.json"


@functools.cache
def _caption_flops(model: nn.Module, tokens: int) -> float:
    batch = TokenBatch.pack([[0] * tokens], META)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(batch) if isinstance(model, NVEmbed) else model(input_ids=batch.ids[None])
    return float(counter.get_total_flops())
