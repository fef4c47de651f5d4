"""Heads in the layout of the paper's own code (lezhang7/SAIL), read and written.

Such a checkpoint is a dictionary with a `state_dict`, or that dictionary itself. Only tensors are
read from it; nothing in it is run.
"""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from align.config import HeadConfig, LossConfig
from align.head import AlignmentModel, build_model
from features.errors import CheckpointError

Kind = Literal["star", "mlp", "linear"]
MODALITIES = {"vision": "image_head", "text": "text_head"}
# Their names of the layers of a mapping network, and ours; what is left is the linear head.
LAYERS: dict[Kind, dict[str, str]] = {
    "star": {"f1": "f1", "f2": "f2", "g": "g"},
    "mlp": {"proj.0": "up", "proj.2": "down"},
    "linear": {"": "linear"},
}
FIRST: dict[Kind, str] = {"star": "f1", "mlp": "proj.0", "linear": ""}


def load_released(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[AlignmentModel, HeadConfig]:
    """Load a checkpoint in the released layout, with a star, an mlp or a linear head.

    The kind and the sizes are those of its tensors; each must be there, and no other.

    Args:
        path: A `.pt` file, such as `sail_dinov2l_nv2.pt`.
        device: Where to put the weights.

    Returns:
        The model, without gradients, and the settings of its head.

    Raises:
        CheckpointError: There is no such file, it holds more than tensors, or its tensors are not
            those of such a head.
    """
    weights = _read(path)
    try:
        kind = _kind(weights)
        image, text = (_sizes(weights, kind, modality) for modality in MODALITIES)
        if image._replace(features=0) != text._replace(features=0):
            raise ValueError(f"image and text heads of other forms: {image} and {text}")
        head = HeadConfig(kind=kind, dim=image.dim, expansion=image.expansion)
        model = build_model(head, LossConfig(), image_dim=image.features, text_dim=text.features)
        names = {ours: theirs for theirs, ours in released_names(kind).items()}
        found = {theirs: tensor.shape for theirs, tensor in weights.items()}
        state = model.state_dict()
        wanted = {names[ours]: tensor.shape for ours, tensor in state.items()}
        wanted |= dict.fromkeys(("logit_scale", "logit_bias"), torch.Size([1]))
        scalar = {name: torch.Size([1]) for name, shape in found.items() if shape == torch.Size()}
        if wrong := sorted(set(wanted.items()) ^ set((found | scalar).items())):
            name, shape = wrong[0]
            raise ValueError(f"{name} of shape {tuple(shape)} is missing or does not belong there")
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a released SAIL head: {error}. A star, an mlp or a linear head was "
            f"expected, with `vision_mapping_network`, `text_mapping_network`, their LayerNorms, "
            f"`logit_scale` and `logit_bias`. Heads trained by this program are folders: give "
            f"the folder."
        ) from error
    model.load_state_dict({ours: weights[names[ours]].reshape(state[ours].shape) for ours in state})
    return model.requires_grad_(False).eval().to(device), head


def save_released(model: AlignmentModel, kind: str, path: Path, *, epoch: int) -> None:
    """Write a head in the released layout, all of the file or nothing.

    Args:
        model: The heads; `log_scale` becomes `logit_scale`, a logarithm there as well.
        kind: `star`, `mlp` or `linear`: those the released code has.
        path: A `.pt` file.
        epoch: Passes over the data, recorded beside the weights.

    Raises:
        CheckpointError: The released code has no head of this kind.
    """
    if kind not in LAYERS:
        raise CheckpointError(
            f"A head of kind {kind!r} has no place in the released layout. One of {list(LAYERS)} "
            f"was expected. Train one with `align.head.kind`, or use the folder of the checkpoint."
        )
    state = model.state_dict()
    weights = {
        theirs: state[ours].detach().cpu().clone().reshape(state[ours].shape or (1,))
        for theirs, ours in released_names(kind).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    torch.save({"epoch": epoch, "name": "sail", "state_dict": weights}, partial)
    os.replace(partial, path)  # noqa: PTH105 - Path.replace is the same call with a longer trace


def released_names(kind: Kind) -> dict[str, str]:
    """Return our name of each tensor of the released layout."""
    names = {"logit_scale": "log_scale", "logit_bias": "bias"}
    for modality, ours in MODALITIES.items():
        for part in ("weight", "bias"):
            names[f"{modality}_layer_norm.{part}"] = f"{ours}.norm.{part}"
            for theirs, layer in LAYERS[kind].items():
                network = ".".join(filter(None, [f"{modality}_mapping_network", theirs, part]))
                names[network] = f"{ours}.{layer}.{part}"
    return names


def _read(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read: {reason} A PyTorch file with nothing but tensors and numbers "
            f"was expected. Fetch it again."
        ) from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not isinstance(weights, dict):
        weights = {}
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}


def _kind(weights: dict[str, Tensor]) -> Kind:
    for kind in LAYERS:
        if _first(kind, "vision") in weights:
            return kind
    raise ValueError("it has no `vision_mapping_network` of a kind that is known here")


def _first(kind: Kind, modality: str) -> str:
    return ".".join(filter(None, [f"{modality}_mapping_network", FIRST[kind], "weight"]))


class _Sizes(NamedTuple):
    """The length of a feature, that of an embedding, and the hidden width by the first."""

    features: int
    dim: int
    expansion: int | None


def _sizes(weights: dict[str, Tensor], kind: Kind, modality: str) -> _Sizes:
    hidden, features = _matrix(weights, _first(kind, modality))
    if kind == "linear":
        return _Sizes(features, hidden, None)
    dim, _ = _matrix(weights, f"{modality}_mapping_network.{list(LAYERS[kind])[-1]}.weight")
    return _Sizes(features, dim, hidden // features)


def _matrix(weights: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Return how many rows and columns a matrix has."""
    if name not in weights or weights[name].ndim != 2:
        raise ValueError(f"it has no matrix {name}")
    rows, columns = weights[name].shape
    return rows, columns
