"""Makes one vector of the tokens of an image: which tokens, and of which layer."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from features.config import ImageColumnConfig
from features.encoders.structure import Structure, as_tokens, count_prefix, structure_of
from features.errors import EncoderError

LAST_LAYER = -1
OUTPUTS = {"pooler": "pooler_output", "projection": "image_embeds"}


def pool_image(
    model: nn.Module,
    pixels: Float[Tensor, "batch 3 height width"],
    wanted: Sequence[ImageColumnConfig],
) -> list[Float[Tensor, "batch _"]]:
    """Run a vision model once, and make one vector an image for each pooling that is wanted.

    Layer -1 is the model's `last_hidden_state`; any other is an entry of its `hidden_states` as
    transformers gives them, which for most models means before the final normalisation.

    Raises:
        EncoderError: The model has not what a pooling asks for.
    """
    hidden = any(each.layer != LAST_LAYER for each in wanted)
    output = run_model(model, pixels, hidden=hidden)
    return [_pooled(model, output, pixels, each) for each in wanted]


def run_model(
    model: nn.Module, pixels: Float[Tensor, "batch 3 height width"], *, hidden: bool, **options: Any
) -> Any:
    """Run a vision model once.

    Args:
        model: Of transformers, or a baseline.
        pixels: Standardised.
        hidden: Whether its layers before the last are wanted too.
        **options: Of the model's own.
    """
    config: Any = model.config
    if getattr(config, "model_type", "") == "vit_mae":
        side = config.patch_size
        count = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
        # MAE orders its tokens by noise even when nothing is masked: rising noise keeps the order.
        options["noise"] = torch.arange(count, device=pixels.device).expand(len(pixels), -1)
    if config is not None and hidden:
        options["output_hidden_states"] = True
    return model(pixels, **options)


def layer_tokens(model: nn.Module, output: Any, layer: int) -> Tensor:
    """Return the tokens of a layer: (batch, tokens, dim), or a map (batch, dim, height, width).

    Raises:
        EncoderError: The model has no such layer.
    """
    if layer == LAST_LAYER:
        last: Tensor = output.last_hidden_state
        return last
    layers: Sequence[Tensor] = getattr(output, "hidden_states", None) or ()
    if not -len(layers) <= layer < len(layers):
        there = f"-{len(layers)} to {len(layers) - 1}" if layers else "-1 alone"
        raise EncoderError(
            f"{type(model).__name__} has no layer {layer}. {there} was expected. Correct `layer`."
        )
    return layers[layer]


def patch_side(model: nn.Module) -> int:
    """Return the side of a patch in pixels.

    Raises:
        EncoderError: The configuration of the model does not say it.
    """
    patch = getattr(model.config, "patch_size", None)
    if isinstance(patch, list | tuple) and len(set(patch)) == 1:
        patch = patch[0]
    if not isinstance(patch, int):
        raise EncoderError(
            f"The patches of {type(model).__name__} cannot be told from its other tokens: its "
            f"config has patch_size {patch!r}, not a number. Use pooling `pooler`."
        )
    return patch


def _pooled(model: nn.Module, output: Any, pixels: Tensor, wanted: ImageColumnConfig) -> Tensor:
    pooling = wanted.pooling
    if pooling in OUTPUTS:
        return _own_output(model, output, pooling)
    tokens = layer_tokens(model, output, wanted.layer)
    if tokens.ndim == 4:
        tokens, found = as_tokens(model, tokens), Structure(0, 0)
    else:
        found = count_prefix(model, tokens, _patches(model, pixels))
    patches = tokens[:, found.prefix or 0 :]
    if "cls" in pooling and found.classes != 1:
        has = f"{found.classes} class tokens" if found.classes else "no class token"
        raise EncoderError(
            f"{type(model).__name__} has {has}, so pooling {pooling!r} is not there. Use `mean`, "
            f"`mean+max`{' or `pooler`' if _has_pooler(output) else ''}."
        )
    parts = {
        "cls": lambda: [tokens[:, 0]],
        "mean": lambda: [patches.mean(1)],
        "cls+mean": lambda: [tokens[:, 0], patches.mean(1)],
        "mean+max": lambda: [patches.mean(1), patches.amax(1)],
    }[pooling]()
    return torch.cat(parts, dim=-1)


def _has_pooler(output: Any) -> bool:
    return getattr(output, "pooler_output", None) is not None


def _own_output(model: nn.Module, output: Any, pooling: str) -> Tensor:
    found = getattr(output, OUTPUTS[pooling], None)
    if found is None:
        raise EncoderError(
            f"{type(model).__name__} has no {pooling}, so pooling {pooling!r} is not there. Use "
            f"`mean`, or `cls` where it has a class token."
        )
    result: Tensor = found.flatten(1)
    return result


def _patches(model: nn.Module, pixels: Tensor) -> int | None:
    """Return how many patches the config divides an image into; None where it does not say."""
    known = structure_of(model.config)
    if known is not None and known.prefix is None:
        return None
    side = patch_side(model)
    return (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
