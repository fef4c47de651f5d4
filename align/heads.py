"""The heads: small networks from the features of a frozen encoder into the shared space.

`HEADS` has every kind. This file needs nothing but torch, because `sail export` copies it beside
the weights of a head. What the settings mean and which values they take is in `align.config`.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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

    def normalise(self, features: Tensor) -> Tensor:
        """Give every row of (rows, features) mean 0 and variance 1."""
        return F.layer_norm(features, (self.features,))

    def forward(self, normalised: Tensor, linear: nn.Linear) -> Tensor:
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
        ctx: Any, normalised: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(normalised, gamma, beta, weight)
        ctx.autocast = _autocast(normalised.device.type)
        return F.linear(normalised * gamma + beta, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normalised, gamma, beta, weight = ctx.saved_tensors
        with ctx.autocast:
            product = (gradient.T @ normalised).to(weight.dtype)  # (out, dim)
        summed = gradient.sum(dim=0, dtype=weight.dtype)
        gamma_gradient = (weight * product).sum(dim=0)
        beta_gradient = summed @ weight
        weight_gradient = product.mul_(gamma).addr_(summed, beta)
        return None, gamma_gradient, beta_gradient, weight_gradient, summed


def _autocast(device: str) -> AbstractContextManager[Any]:
    """Return what brings the present state of autocast back."""
    if not torch.amp.is_autocast_available(device):  # on "meta", where work is only counted
        return nullcontext()
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=enabled)


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

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (rows, dim) to (rows, out)."""
        normalised = self.norm(inputs)
        passed = F.glu(self.gated(normalised), dim=-1)
        if self.dropout:
            passed = F.dropout(passed, self.dropout, training=self.training)
        kept: Tensor = inputs if self.skip is None else self.skip(normalised)
        return kept + passed


class Shortcut(nn.Module):
    """A linear map beside the layers of a head: Wx̂ + b + g ⊙ y, with the gates g = 0 at the start.

    x̂ is the feature after a LayerNorm without weights, y what the layers make of it. A head that
    begins with the closed form in W and b gives its embeddings at step 0.

    Reference:
        Gates from zero: Bachlechner et al. 2020, ReZero, arXiv:2003.04887.
    """

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.features = feature_dim
        self.linear = nn.Linear(feature_dim, dim)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Join the map of features (rows, feature_dim) with what the layers made of them."""
        linear: Tensor = self.linear(F.layer_norm(features, (self.features,)))
        return linear + self.gate * embedding


class GLUHead(nn.Module):
    """A stack of gated layers with LayerNorm and residual in each.

    The residual stream is never normalised in place (pre-norm), so that eight layers train at the
    learning rate of one.

    Reference:
        Gated units: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202 (without its
        second projection). Pre-norm: Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        dim: int,
        depth: int,
        width: int | None = None,
        dropout: float = 0.0,
        shortcut: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        sizes = [feature_dim, *[width or dim] * (depth - 1), dim]
        self.layers = nn.ModuleList(
            GLULayer(size, out, first=number == 0, dropout=dropout)
            for number, (size, out) in enumerate(pairwise(sizes))
        )
        self.shortcut = Shortcut(feature_dim, dim) if shortcut else None

    def forward(self, features: Tensor) -> Tensor:
        """Map features (rows, feature_dim) to embeddings (rows, dim), which are not normalised."""
        embedding = features
        for layer in self.layers:
            embedding = layer(embedding)
        return self.shortcut(features, embedding) if self.shortcut else embedding


class StarHead(nn.Module):
    """The released head: g(ReLU6(f1·LN(x)) ⊙ f2·LN(x)), hidden width a multiple of the input's.

    Reference:
        Zhang et al. 2025, Assessing and Learning Alignment of Unimodal Vision and Language Models,
        arXiv:2412.04616, and its code (lezhang7/SAIL at b39de67, model/linear.py).
    """

    def __init__(
        self, feature_dim: int, *, dim: int, expansion: int | None = None, **_: object
    ) -> None:
        super().__init__()
        hidden = (expansion or STAR_EXPANSION) * feature_dim
        self.norm = FrozenInputNorm(feature_dim)
        self.f1 = nn.Linear(feature_dim, hidden)
        self.f2 = nn.Linear(feature_dim, hidden)
        self.g = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (rows, feature_dim) to embeddings (rows, dim), which are not normalised."""
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

    def __init__(
        self,
        feature_dim: int,
        *,
        dim: int,
        expansion: int | None = None,
        shortcut: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        hidden = (expansion or MLP_EXPANSION) * feature_dim
        self.norm = FrozenInputNorm(feature_dim)
        self.up = nn.Linear(feature_dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.shortcut = Shortcut(feature_dim, dim) if shortcut else None

    def forward(self, features: Tensor) -> Tensor:
        """Map features (rows, feature_dim) to embeddings (rows, dim), which are not normalised."""
        hidden = F.gelu(self.norm(self.norm.normalise(features), self.up))
        embedding: Tensor = self.down(hidden)
        return self.shortcut(features, embedding) if self.shortcut else embedding


class LinearHead(nn.Module):
    """LayerNorm and one matrix: what alignment probing trains."""

    def __init__(self, feature_dim: int, *, dim: int, **_: object) -> None:
        super().__init__()
        self.norm = FrozenInputNorm(feature_dim)
        self.linear = nn.Linear(feature_dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (rows, feature_dim) to embeddings (rows, dim), which are not normalised."""
        embedding: Tensor = self.norm(self.norm.normalise(features), self.linear)
        return embedding


class NoHead(nn.Module):
    """Features as they are: what two towers that were trained together give, such as CLIP's.

    Training has nothing to do but scale and bias of the logits. `gain`, which no cosine depends on,
    is there since what has no weight at all has no gradient to give.
    """

    def __init__(self, feature_dim: int, *, dim: int, **_: object) -> None:
        super().__init__()
        if dim != feature_dim:
            raise ValueError(
                f"align.head.dim is {dim}, but without a head an embedding has the {feature_dim} "
                f"numbers of a feature. Set align.head.dim = {feature_dim}; both encoders must "
                f"have as many."
            )
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """Return features (rows, feature_dim) as they are, but for the gain."""
        return features * self.gain


HEADS: dict[str, type[nn.Module]] = {
    "glu": GLUHead,
    "star": StarHead,
    "mlp": MLPHead,
    "linear": LinearHead,
    "none": NoHead,
}
"""Every kind of head by its name in `[align.head]`.

A kind is made of the length of a feature and of the settings in `[align.head]`, by name; those of
other kinds it ignores. It maps float tensors (rows, feature length) to (rows, `dim`).
"""


def build_head(feature_dim: int, *, kind: str, **settings: Any) -> nn.Module:
    """Make a head with random weights from torch's global generator.

    Args:
        feature_dim: Length of a feature.
        kind: A key of `HEADS`.
        settings: The others of `[align.head]`.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in HEADS:
        raise ValueError(f"There is no head of kind {kind!r}. One of {list(HEADS)} was expected.")
    return HEADS[kind](feature_dim, **settings)


def linear_map(head: nn.Module) -> nn.Linear | None:
    """Return the linear map from a normalised feature that a head begins with, if it has one."""
    if isinstance(head, LinearHead):
        return head.linear
    shortcut = getattr(head, "shortcut", None)
    return shortcut.linear if isinstance(shortcut, Shortcut) else None


def standardised(features: Tensor, dims: Sequence[int]) -> Tensor:
    """Give each of several columns side by side mean 0 and variance 1 in every row.

    So none outweighs the others by its scale. A single column is left to the head as it is.

    Args:
        features: (..., sum of the lengths).
        dims: Length of each column.
    """
    if len(dims) < 2:
        return features
    parts = torch.split(features, list(dims), dim=-1)
    return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], dim=-1)


class AlignmentModel(nn.Module):
    """Two heads into one shared space, and the scale and bias that turn cosines into logits.

    Logits are exp(log_scale)·cosine + bias. Embeddings are not normalised; losses and measures do
    that. Features of several columns are `standardised` before a head.
    """

    def __init__(
        self,
        image_head: nn.Module,
        text_head: nn.Module,
        *,
        image_dims: Sequence[int] = (),
        text_dims: Sequence[int] = (),
        log_scale: float,
        bias: float,
    ) -> None:
        super().__init__()
        self.image_dims, self.text_dims = tuple(image_dims), tuple(text_dims)
        self.image_head = image_head
        self.text_head = text_head
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.bias = nn.Parameter(torch.tensor(bias))

    def embed_image(self, features: Tensor) -> Tensor:
        """Embed features of images, of any floating type: (rows, feature length) to (rows, dim)."""
        columns = standardised(features.to(self.log_scale.dtype), self.image_dims)
        embedding: Tensor = self.image_head(columns)
        return embedding

    def embed_text(self, features: Tensor) -> Tensor:
        """Embed features of captions or prompts, as `embed_image` does those of images."""
        columns = standardised(features.to(self.log_scale.dtype), self.text_dims)
        embedding: Tensor = self.text_head(columns)
        return embedding

    @property
    def scale_and_bias(self) -> tuple[float, float]:
        """What turns a cosine into a logit, as numbers to show."""
        return self.log_scale.exp().item(), self.bias.item()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale at 100 at most, as CLIP does; called after every update."""
        self.log_scale.clamp_(max=MAX_LOG_SCALE)


def build_model(
    head: Mapping[str, Any],
    *,
    image_dim: int | Sequence[int],
    text_dim: int | Sequence[int],
    initial_scale: float = 1.0,
    initial_bias: float = 0.0,
) -> AlignmentModel:
    """Make a model with random weights from torch's global generator.

    Args:
        head: `[align.head]` of the run file, or `run.align.head` in config.json of a checkpoint.
        image_dim: Length of an image feature, or those of several columns side by side.
        text_dim: Length of a text feature, likewise.
        initial_scale: exp(log_scale).
        initial_bias: Of the logits.

    Raises:
        ValueError: There is no such kind of head.
    """
    image, text = ((dim,) if isinstance(dim, int) else dim for dim in (image_dim, text_dim))
    return AlignmentModel(
        build_head(sum(image), **head),
        build_head(sum(text), **head),
        image_dims=image,
        text_dims=text,
        log_scale=math.log(initial_scale),
        bias=initial_bias,
    )
