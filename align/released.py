"""Heads that were trained by the paper's own code (lezhang7/SAIL), as models of this project.

Such a checkpoint is a dictionary with a `state_dict`, or that dictionary itself. Only tensors are
read from it; nothing in it is run.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from align.config import HeadConfig
from align.head import AlignmentModel, LinearHead, StarHead
from features.errors import CheckpointError

MODALITIES = {"vision": "image_head", "text": "text_head"}


def load_released(path: Path, device: torch.device | str = "cpu") -> AlignmentModel:
    """Load a checkpoint in the released layout, with a star or a linear head.

    The sizes are those of its tensors.

    Args:
        path: A `.pt` file, such as `sail_dinov2l_nv2.pt`.
        device: Where to put the weights.

    Raises:
        CheckpointError: There is no such file, it holds more than tensors, or its tensors are not
            those of such a head.
    """
    weights = _read(path)
    is_star = "vision_mapping_network.f1.weight" in weights
    renamed = {
        new: tensor.reshape(()) if tensor.shape == (1,) else tensor
        for old, tensor in weights.items()
        for new in [_renamed(old, is_star=is_star)]
    }
    try:
        model = _build(weights, is_star=is_star)
        model.load_state_dict(renamed)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a released SAIL head: {error}. A star or a linear head was expected, "
            f"with `vision_mapping_network`, `text_mapping_network` and their LayerNorms. Heads "
            f"trained by this program are folders: give the folder."
        ) from error
    return model.requires_grad_(False).eval().to(device)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. A PyTorch file with nothing but tensors and numbers "
            f"was expected. Fetch it again."
        ) from error
    weights: dict[str, Tensor] = loaded.get("state_dict", loaded)
    return weights


def _renamed(name: str, *, is_star: bool) -> str:
    """Return our name of one of their tensors."""
    plain = {"logit_scale": "log_scale", "logit_bias": "bias"}  # theirs is a logarithm as well
    modality, _, rest = name.partition("_")
    if modality not in MODALITIES:
        return plain.get(name, name)
    rest = rest.replace("layer_norm.", "norm.")
    rest = rest.replace("mapping_network.", "" if is_star else "linear.")
    return f"{MODALITIES[modality]}.{rest}"


def _build(weights: dict[str, Tensor], *, is_star: bool) -> AlignmentModel:
    heads: list[StarHead | LinearHead] = []
    for modality in MODALITIES:
        if is_star:
            hidden, features = weights[f"{modality}_mapping_network.f1.weight"].shape
            dim = len(weights[f"{modality}_mapping_network.g.weight"])
            config = HeadConfig(kind="star", dim=dim, expansion=hidden // features)
            heads.append(StarHead(features, config))
        else:
            dim, features = weights[f"{modality}_mapping_network.weight"].shape
            heads.append(LinearHead(features, HeadConfig(kind="linear", dim=dim)))
    return AlignmentModel(heads[0], heads[1], log_scale=0.0, bias=0.0)
