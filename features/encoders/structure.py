"""Which tokens of an image model are what: class tokens, registers, patches; by the type of model.

Nothing of this can be told from a model's output: that has one token more than patches, or sixteen
times fewer, and does not say why.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from features.errors import EncoderError


class Structure(NamedTuple):
    """Tokens of an image in order: class tokens, others, then the patches row by row."""

    classes: int
    """Class tokens; the first of them is the image's."""
    prefix: int | None
    """All tokens before the patches. None: there are none, and a token is no patch of the config's
    size, since the model merges them."""


def _plain(config: Any) -> Structure:  # noqa: ARG001 - as the others
    return Structure(1, 1)


def _patches_only(config: Any) -> Structure:  # noqa: ARG001
    return Structure(0, 0)


def _merged(config: Any) -> Structure:  # noqa: ARG001
    return Structure(0, None)


def _with_registers(config: Any) -> Structure:
    return Structure(1, 1 + int(config.num_register_tokens))


def _as_counted(config: Any) -> Structure | None:
    """Return what a model of timm itself says of its tokens."""
    return None if config.prefix is None else Structure(config.classes, config.prefix)


STRUCTURES: dict[str, Callable[[Any], Structure | None]] = {
    **dict.fromkeys(
        ("vit", "vit_mae", "vit_msn", "dinov2", "beit", "data2vec-vision", "mlcd_vision_model"),
        _plain,
    ),
    **dict.fromkeys(
        (
            "clip_vision_model",
            "metaclip_2_vision_model",
            "blip_vision_model",
            "altclip_vision_model",
        ),
        _plain,
    ),
    **dict.fromkeys(("chinese_clip_vision_model", "clipseg_vision_model"), _plain),
    **dict.fromkeys(("dinov2_with_registers", "dinov3_vit"), _with_registers),
    "deit": lambda _: Structure(1, 2),  # behind the class token stands that of distillation
    "pixio": lambda config: Structure(int(config.n_cls_tokens), int(config.n_cls_tokens)),
    **dict.fromkeys(
        ("ijepa", "siglip_vision_model", "aimv2_vision_model", "poolformer"), _patches_only
    ),
    **dict.fromkeys(
        ("swin", "swinv2", "donut-swin", "maskformer-swin", "focalnet", "hiera"), _merged
    ),
    "timm": _as_counted,
}


def structure_of(config: Any) -> Structure | None:
    """Return the structure of a type of models; None where it is not known."""
    known = STRUCTURES.get(getattr(config, "model_type", ""))
    return None if known is None else known(config)


def count_prefix(model: nn.Module, tokens: Tensor, patches: int | None) -> Structure:
    """Return the structure of a model's tokens, by its type or else by their number.

    Args:
        model: Its config has the type.
        tokens: (batch, tokens, dim), what it gave.
        patches: Of the images; None where the config does not say their size.

    Raises:
        EncoderError: The type is not known, and neither is what its tokens are; or it is known,
            and has not as many as it should.
    """
    known = structure_of(model.config)
    name, count = type(model).__name__, tokens.shape[1]
    if known is not None and known.prefix is None:
        return known
    if patches is None or count < patches or (known is None and count > patches + 1):
        raise EncoderError(
            f"The patches of {name} cannot be told from its other tokens: it gives {count} for "
            f"{'an unknown number of' if patches is None else patches} patches. Use pooling "
            f"`pooler`, or another encoder."
        )
    if known is not None and count != patches + (known.prefix or 0):
        raise EncoderError(
            f"{name} gives {count} tokens for {patches} patches and {known.prefix} others. "
            f"{patches + (known.prefix or 0)} were expected. Use pooling `pooler`."
        )
    return known or Structure(count - patches, count - patches)


def check_prefix(model: nn.Module, size: tuple[int, int], device: torch.device) -> None:
    """Check by two pictures what was counted: tokens before the patches begin alike in all.

    Models whose type is in `STRUCTURES` are held to it by tests; others are tried here.

    Raises:
        EncoderError: Another token is the same in both pictures.
    """
    config: Any = model.config
    if config is None or structure_of(config) is not None:
        return
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    output = model(noise, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    last = output.last_hidden_state
    side = getattr(config, "patch_size", None)
    if last.ndim != 3 or not states or states[0].shape[:2] != last.shape[:2]:
        return
    patches = (size[0] // side) * (size[1] // side) if isinstance(side, int) else None
    counted = count_prefix(model, last, patches)
    alike = (states[0][0] == states[0][1]).all(dim=1).nonzero().flatten().tolist()
    if alike != list(range(counted.prefix or 0)):
        raise EncoderError(
            f"The tokens {alike} of {type(model).__name__} do not depend on the picture, but "
            f"{counted.prefix} before the patches were counted. These were expected to be the "
            f"same. Use pooling `pooler`, or another encoder."
        )


def as_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return a map of features, whose channels may stand first or last, as (batch, tokens, dim).

    Raises:
        EncoderError: The config does not say how many channels there are, so which axis has them.
    """
    config: Any = model.config
    sizes = getattr(config, "hidden_sizes", None) or [getattr(config, "hidden_size", None)]
    first, last = tokens.shape[1], tokens.shape[-1]
    is_last = last in sizes and first not in sizes
    is_first = first in sizes or (tokens.shape[2] == last and first != last and not is_last)
    if not (is_first or is_last):
        raise EncoderError(
            f"{type(model).__name__} gives a map of shape {tuple(tokens.shape[1:])}, of which no "
            f"axis is known to be the channels. Use pooling `pooler`, or another encoder."
        )
    return tokens.flatten(1, 2) if is_last else tokens.flatten(2).transpose(1, 2)
