"""Features of the patches of an image, where a pooling would make one vector of them."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Num
from torch import Tensor, nn

from features.config import PatchAttention
from features.encoders.image import ImageColumn, ImageEncoder, free_position_tables
from features.encoders.pooling import LAST_LAYER, layer_tokens, patch_side, run_model
from features.errors import EncoderError
from features.images import DEFAULTS, Preprocessing

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj")
SIMILARITIES: dict[PatchAttention, tuple[str, ...]] = {
    "maskclip": (),
    "qq": ("q_proj",),
    "kk": ("k_proj",),
    "vv": ("v_proj",),
    "sclip": ("q_proj", "k_proj"),
    "clearclip": ("q_proj",),
}
"""Projections that are compared with themselves; where there are several, the maps are added."""


@contextmanager
def last_attention(model: nn.Module, kind: PatchAttention) -> Iterator[None]:
    """Let the last block of a model attend in another way while the context is open.

    Args:
        model: A vision transformer of transformers; as it was when the context closes.
        kind: `plain` changes nothing; see `PatchAttention`.

    Raises:
        EncoderError: The model has no such block.

    Reference:
        Zhou et al. 2022, Extract Free Dense Labels from CLIP (MaskCLIP), arXiv:2112.01071: a
        patch attends to itself alone. Wang et al. 2024, SCLIP, arXiv:2312.01597: queries with
        queries plus keys with keys. Lan et al. 2024, ClearCLIP, arXiv:2407.12442: queries with
        queries, without the residual and the MLP.
    """
    if kind == "plain":
        yield
        return
    path, own = _last(model)
    block, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    instead = _SelfSimilarity(own, SIMILARITIES[kind])
    with ExitStack() as stack:
        setattr(block, name, instead)
        stack.callback(setattr, block, name, own)
        if kind == "clearclip":
            _leave_out_the_rest(block, instead, stack)
        yield


class _SelfSimilarity(nn.Module):
    """Stands in for an attention, whose projections it uses."""

    def __init__(self, own: nn.Module, projections: tuple[str, ...]) -> None:
        super().__init__()
        self._own: Any = own
        self._twins = nn.ModuleList(_compared_with_itself(own, each) for each in projections)
        self._out: Any = _output(own)

    def forward(self, hidden_states: Tensor, *others: Any, **options: Any) -> tuple[Tensor, None]:
        if not self._twins:
            return self._out(self._own.v_proj(hidden_states)), None
        first, *more = [twin(hidden_states, *others, **options)[0] for twin in self._twins]
        for output in more:  # of two maps, whose sum passes the output projection once
            first = first + output
            if self._out.bias is not None:
                first = first - self._out.bias
        return first, None


def _compared_with_itself(own: nn.Module, projection: str) -> nn.Module:
    """Return a copy of an attention whose queries and keys are one and the same projection."""
    twin = copy.deepcopy(own)
    same = twin.get_submodule(projection)
    twin.register_module("q_proj", same)
    twin.register_module("k_proj", same)
    return twin


def _leave_out_the_rest(block: nn.Module, attention: nn.Module, stack: ExitStack) -> None:
    """Let a block give what its attention gives, scaled where the block scales it."""
    scale = getattr(block, "layer_scale1", nn.Identity())
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: tuple[Tensor, None]) -> None:
        seen.append(output[0])

    def give(_module: nn.Module, _inputs: Any, _output: Tensor) -> Tensor:
        given: Tensor = scale(seen.pop())
        return given

    stack.callback(attention.register_forward_hook(keep).remove)
    stack.callback(block.register_forward_hook(give).remove)


def _last(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the last attention of a model and its path."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if all(isinstance(getattr(module, each, None), nn.Linear) for each in PROJECTIONS)
        and any(isinstance(getattr(module, each, None), nn.Linear) for each in OUTPUTS)
    ]
    if not found:
        raise EncoderError(
            f"{type(model).__name__} has no attention of queries, keys and values that could be "
            f"changed. A vision transformer such as Dinov2Model or ViTModel was expected. Set "
            f"`attention` of the data set in [eval.segmentation] to 'plain'."
        )
    return found[-1]


def _output(attention: nn.Module) -> nn.Module:
    return next(
        module
        for name in OUTPUTS
        if isinstance(module := getattr(attention, name, None), nn.Module)
    )


Form = Literal["patch", "cls+patch", "patch+patch"]
FORMS: dict[str, Form] = {
    "cls": "patch",
    "mean": "patch",
    "cls+mean": "cls+patch",
    "mean+max": "patch+patch",
}
"""What stands for a patch where a head reads a pooling: the pooling of that patch alone."""
CLOSE = 1e-3


@dataclass(frozen=True)
class PatchEncoder:
    """A frozen image encoder that gives a vector for each patch, in the space of a column.

    * `cls` and `mean`: the patch token in the place of the class token or of the mean.
    * `cls+mean`: the class token of the window, then the patch token (SAIL).
    * `mean+max`: the patch token twice.
    * `pooler`: only where it is the mean of a convolutional map, or the class token.
    """

    encoder: ImageEncoder
    column: ImageColumn
    attention: PatchAttention
    form: Form
    patch: int
    """Side of a patch in pixels."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures are prepared.

        Raises:
            EncoderError: Its processor takes whole pictures, which cannot be cut into windows.
        """
        found = self.encoder.preprocessing
        if isinstance(found, Preprocessing):
            return found
        raise EncoderError(
            f"Pictures cannot be cut into windows for {found.processor}, which prepares whole "
            f"ones. One of {', '.join(DEFAULTS)} was expected. Choose another encoder for "
            f"segmentation."
        )

    @torch.inference_mode()
    def normalise(self, pixels: Num[Tensor, "3 height width"]) -> Float32[Tensor, "3 height width"]:
        """Put a picture of bytes on the device, standardised as the encoder's checkpoint asks."""
        device = self.encoder.device
        return self.preprocessing.normaliser(device)(pixels[None].to(device))[0]

    @torch.inference_mode()
    def encode(
        self, windows: Float[Tensor, "windows 3 height width"]
    ) -> Float32[Tensor, "windows rows columns dim"]:
        """Return the features of each patch, as a store would hold them: rounded to float16.

        Args:
            windows: Standardised; their sides are multiples of `patch`.

        Raises:
            EncoderError: The encoder takes no images of this size.
        """
        encoder, dtype = self.encoder, self.encoder.dtype
        with (
            last_attention(encoder.model, self.attention),
            torch.autocast(encoder.device.type, dtype, enabled=dtype != torch.float32),
        ):
            _, first, grid = _tokens(encoder.model, windows, self.column.settings.layer)
        if self.form == "cls+patch" and first is not None:
            grid = torch.cat([first[:, None, None].expand_as(grid), grid], dim=-1)
        elif self.form == "patch+patch":
            grid = torch.cat([grid, grid], dim=-1)
        return grid.to(torch.float16).float()


def patch_encoder(
    encoder: ImageEncoder, column: ImageColumn, attention: PatchAttention = "plain"
) -> PatchEncoder:
    """Make an encoder of patches from a loaded image encoder, which then takes images of any size.

    Args:
        encoder: As it is loaded for extraction.
        column: The column that the head was trained on: its pooling and layer.
        attention: Of the last block.

    Raises:
        EncoderError: The encoder has no patches, no such attention, or a pooler that mixes patches
            in a way of its own.
    """
    layer = column.settings.layer
    if attention != "plain" and layer != LAST_LAYER:
        raise EncoderError(
            f"attention = {attention!r} changes the last block of an encoder, but the features of "
            f"{column.name!r} are of layer {layer}. Layer -1 was expected. Set `attention` of the "
            f"data set in [eval.segmentation] to 'plain'."
        )
    free_position_tables(encoder.model)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, *encoder.preprocessing.output_size, generator=generator)
    with torch.inference_mode():
        output, first, grid = _tokens(encoder.model, noise.to(encoder.device), layer)
    pooling = column.settings.pooling
    form = _form_of_pooler(encoder.model, output, first, grid) if pooling == "pooler" else None
    is_map = output.last_hidden_state.ndim == 4
    patch = noise.shape[-1] // grid.shape[2] if is_map else patch_side(encoder.model)
    made = PatchEncoder(encoder, column, attention, form or FORMS[pooling], patch)
    _ = made.preprocessing
    made.encode(noise.to(encoder.device))  # so that an attention it has not is told at once
    return made


def _tokens(
    model: nn.Module, pixels: Tensor, layer: int
) -> tuple[Any, Tensor | None, Float[Tensor, "windows rows columns dim"]]:
    """Return the output of a model, its class token where there is one, and its patches."""
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True
    try:
        output = run_model(model, pixels, hidden=layer != LAST_LAYER, **options)
    except ValueError as error:
        raise EncoderError(
            f"{type(model).__name__} takes no image of {pixels.shape[-2]} × {pixels.shape[-1]} "
            f"pixels: {error} Any size was expected, since pictures are cut into windows. Set "
            f"`crop` of the data set in [eval.segmentation] to the size of the encoder."
        ) from error
    tokens = layer_tokens(model, output, layer)
    if tokens.ndim == 4:  # a convolutional map
        return output, None, tokens.permute(0, 2, 3, 1)
    side = patch_side(model)
    rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
    prefix = tokens.shape[1] - rows * columns
    if prefix < 0:
        raise EncoderError(
            f"{type(model).__name__} gives {tokens.shape[1]} tokens for {rows} × {columns} "
            f"patches. One for each patch was expected. Take an encoder that keeps its patches, "
            f"such as Dinov2Model, for segmentation."
        )
    grid = tokens[:, prefix:].reshape(len(tokens), rows, columns, -1)
    return output, tokens[:, 0] if prefix else None, grid


def _form_of_pooler(model: nn.Module, output: Any, first: Tensor | None, grid: Tensor) -> Form:
    """Find out what a pooler is: a mean of patches or the class token; nothing else will do."""
    pooled = getattr(output, "pooler_output", None)
    simple = grid.mean((1, 2)) if first is None else first
    if pooled is None or pooled.flatten(1).shape != simple.shape:
        found = False
    else:
        found = torch.allclose(pooled.flatten(1), simple, atol=CLOSE, rtol=CLOSE)
    if not found:
        raise EncoderError(
            f"The pooler of {type(model).__name__} is neither the mean of its patches nor its "
            f"class token, so a patch has no place among its features. Another pooling was "
            f"expected for segmentation. Train a head on `cls`, `mean` or `cls+mean`."
        )
    return "patch"
