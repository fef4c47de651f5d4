"""Heads in the layout of the paper's own code (lezhang7/SAIL), read and written.

Such a checkpoint is a dictionary with a `state_dict`, or that dictionary itself. Only tensors are
read from it; nothing in it is run.
"""

import math
import os
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from align.config import HeadConfig, LossConfig
from features.errors import CheckpointError

MAX_LOG_SCALE = math.log(100)
STAR_EXPANSION, MLP_EXPANSION = 8, 4
GATE_LIMIT = 1000.0  # the released code clamps both gate inputs to it


class FrozenInputNorm(nn.Module):
    """LayerNorm in front of linear maps, for an input that needs no gradient.

    The weights γ and β would be the only reason to form the gradient of the input of those maps:
    see `_FrozenInputLinear`, which finds theirs without it.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def normalise(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Return the input with mean 0 and variance 1 in every row."""
        return F.layer_norm(features, (self.features,))

    def forward(
        self, normalised: Float[Tensor, "batch dim"], linear: nn.Linear
    ) -> Float[Tensor, "batch out"]:
        """Apply the LayerNorm's weights, then a linear map, to a normalised input."""
        if normalised.requires_grad:  # the encoder is tuned, behind a vision tower
            return F.linear(normalised * self.weight + self.bias, linear.weight, linear.bias)
        output: Tensor = _FrozenInputLinear.apply(  # type: ignore[no-untyped-call]
            normalised, self.weight, self.bias, linear.weight, linear.bias
        )
        return output


class _FrozenInputLinear(torch.autograd.Function):
    """y = W(γ⊙x̂ + β) + b, with every gradient but that of x̂.

    With G = dYᵀx̂ and s = Σ dY (over the batch): dW = G⊙γ + sβᵀ, dγ = Σ_k W_k⊙G_k, dβ = Wᵀs, db = s.
    Autograd would form WᵀdY for γ and β, a third of the work of the layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        normalised: Float[Tensor, "batch dim"],
        gamma: Float[Tensor, "dim"],
        beta: Float[Tensor, "dim"],
        weight: Float[Tensor, "out dim"],
        bias: Float[Tensor, "out"],
    ) -> Float[Tensor, "batch out"]:
        ctx.save_for_backward(normalised, gamma, beta, weight)
        kind = normalised.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return F.linear(normalised * gamma + beta, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "batch out"]) -> tuple[Tensor | None, ...]:
        normalised, gamma, beta, weight = ctx.saved_tensors
        kind, dtype, enabled = ctx.autocast
        with torch.autocast(kind, dtype, enabled=enabled):
            product = (gradient.T @ normalised).to(weight.dtype)  # (out, dim)
        summed = gradient.sum(dim=0, dtype=weight.dtype)
        gamma_gradient = (weight * product).sum(dim=0)
        beta_gradient = summed @ weight
        weight_gradient = product.mul_(gamma).addr_(summed, beta)
        return None, gamma_gradient, beta_gradient, weight_gradient, summed


class GLULayer(nn.Module):
    """One gated layer: x ↦ skip(x) + (W₁x̂+b₁) ⊙ σ(W₂x̂+b₂), with x̂ = LayerNorm(x).

    Where the length changes, `skip` is a matrix of its own applied to x̂. The LayerNorm of the
    first layer has no weights: the matrices behind it can express them, and so its gradient with
    respect to the frozen features is never asked for.
    """

    def __init__(self, dim: int, out: int, *, first: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=not first)
        self.gated = nn.Linear(dim, 2 * out)  # W₁ above W₂: one product for both
        self.skip = nn.Linear(dim, out, bias=False) if dim != out else None
        self.dropout = dropout

    def forward(self, inputs: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Apply the layer."""
        normalised = self.norm(inputs)
        passed = F.glu(self.gated(normalised), dim=-1)
        if self.dropout:
            passed = F.dropout(passed, self.dropout, training=self.training)
        kept: Tensor = inputs if self.skip is None else self.skip(normalised)
        return kept + passed


class GLUHead(nn.Module):
    """A stack of gated layers with LayerNorm and residual in each.

    The residual stream is never normalised in place (pre-norm), so that eight layers train at the
    learning rate of one.

    Reference:
        Gated units: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202 (without its
        second projection). Pre-norm: Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(self, feature_dim: int, config: HeadConfig) -> None:
        super().__init__()
        width = config.width or config.dim
        sizes = [feature_dim, *[width] * (config.depth - 1), config.dim]
        self.layers = nn.ModuleList(
            GLULayer(dim, out, first=number == 0, dropout=config.dropout)
            for number, (dim, out) in enumerate(pairwise(sizes))
        )

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Embed a batch of features; the embedding is not normalised."""
        for layer in self.layers:
            features = layer(features)
        return features


class StarHead(nn.Module):
    """The released head: g(ReLU6(f1·LN(x)) ⊙ f2·LN(x)), hidden width a multiple of the input's.

    Reference:
        Zhang et al. 2025, Assessing and Learning Alignment of Unimodal Vision and Language Models,
        arXiv:2412.04616, and its code (lezhang7/SAIL at b39de67, model/linear.py).
    """

    def __init__(self, feature_dim: int, config: HeadConfig) -> None:
        super().__init__()
        hidden = (config.expansion or STAR_EXPANSION) * feature_dim
        self.norm = FrozenInputNorm(feature_dim)
        self.f1 = nn.Linear(feature_dim, hidden)
        self.f2 = nn.Linear(feature_dim, hidden)
        self.g = nn.Linear(hidden, config.dim)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Embed a batch of features; the embedding is not normalised."""
        normalised = self.norm.normalise(features)
        gate = F.relu6(self.norm(normalised, self.f1))  # the released clamp changes nothing here
        value = self.norm(normalised, self.f2).clamp(-GATE_LIMIT, GATE_LIMIT)
        embedding: Tensor = self.g(gate * value)
        return embedding


class MLPHead(nn.Module):
    """LayerNorm, one hidden layer with GELU, and a matrix into the shared space.

    Reference:
        The MLP of SigLIP's attention pooling, Zhai et al. 2023, arXiv:2303.15343, without its
        residual; the released code of SAIL calls it `mlp`.
    """

    def __init__(self, feature_dim: int, config: HeadConfig) -> None:
        super().__init__()
        hidden = (config.expansion or MLP_EXPANSION) * feature_dim
        self.norm = FrozenInputNorm(feature_dim)
        self.up = nn.Linear(feature_dim, hidden)
        self.down = nn.Linear(hidden, config.dim)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Embed a batch of features; the embedding is not normalised."""
        hidden = F.gelu(self.norm(self.norm.normalise(features), self.up))
        embedding: Tensor = self.down(hidden)
        return embedding


class LinearHead(nn.Module):
    """LayerNorm and one matrix: what alignment probing trains."""

    def __init__(self, feature_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.norm = FrozenInputNorm(feature_dim)
        self.linear = nn.Linear(feature_dim, config.dim)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Embed a batch of features; the embedding is not normalised."""
        embedding: Tensor = self.norm(self.norm.normalise(features), self.linear)
        return embedding


Head = GLUHead | StarHead | MLPHead | LinearHead
HEADS: dict[str, type[Head]] = {
    "glu": GLUHead,
    "star": StarHead,
    "mlp": MLPHead,
    "linear": LinearHead,
}


class AlignmentModel(nn.Module):
    """Two heads into one shared space, and the scale and bias that turn cosines into logits.

    Logits are exp(log_scale)·cosine + bias. Embeddings are not normalised; losses and measures do
    that.
    """

    def __init__(
        self, image_head: nn.Module, text_head: nn.Module, *, log_scale: float, bias: float
    ) -> None:
        super().__init__()
        self.image_head = image_head
        self.text_head = text_head
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.bias = nn.Parameter(torch.tensor(bias))

    def embed_image(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Embed the features of images, of any floating type, in the shared space."""
        embedding: Tensor = self.image_head(features.to(self.log_scale.dtype))
        return embedding

    def embed_text(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Embed the features of captions or prompts, of any floating type, in the shared space."""
        embedding: Tensor = self.text_head(features.to(self.log_scale.dtype))
        return embedding

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale at 100 at most, as CLIP does; called after every update."""
        self.log_scale.clamp_(max=MAX_LOG_SCALE)


def build_model(
    head: HeadConfig, loss: LossConfig, *, image_dim: int, text_dim: int
) -> AlignmentModel:
    """Return a new model with random weights from torch's global generator.

    Args:
        head: The network of both modalities.
        loss: Gives the initial scale and bias.
        image_dim: Length of an image feature.
        text_dim: Length of a text feature.
    """
    kind = HEADS[head.kind]
    return AlignmentModel(
        kind(image_dim, head),
        kind(text_dim, head),
        log_scale=math.log(loss.initial_scale),
        bias=loss.initial_bias,
    )


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
