"""Features of the patches of an image, where a pooling would make one vector of them."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Num
from torch import Tensor, nn

from features.config import PatchAttention
from features.encoders.attention import last_attention
from features.encoders.image import ImageColumn, ImageEncoder
from features.encoders.pooling import LAST_LAYER, layer_tokens, patch_side, run_model
from features.encoders.positions import free_position_tables
from features.errors import EncoderError

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

    @torch.inference_mode()
    def normalise(self, pixels: Num[Tensor, "3 height width"]) -> Float32[Tensor, "3 height width"]:
        """Put a picture of bytes on the device, standardised as the encoder's checkpoint asks."""
        device = self.encoder.device
        return self.encoder.preprocessing.normaliser(device)(pixels[None].to(device))[0]

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
