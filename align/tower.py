"""The image encoder with its trained head as a vision tower of transformers.

Importing this module tells transformers of the class, so that `AutoModel` and the multimodal models
load such a folder; no code from a hub is run. `sail export --to llava` writes one.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from align.config import HeadConfig
from align.head import HEADS
from features.encoders.pooling import layer_tokens, run_model
from features.errors import EncoderError

LAST = -1


class AlignedVisionConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not checked
    """An encoder's own configuration, and the head behind it."""

    model_type = "sail_vision"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        pooling: str = "cls",
        **options: Any,
    ) -> None:
        """Describe a tower.

        Args:
            encoder: The config.json of the encoder, with its `model_type`.
            head: As in `[align.head]`; without one the tower gives what the head would read.
            pooling: Of the features that the head was trained on.
            **options: `hidden_size`, the length of a token; `feature_size`, what the head reads;
                `image_size` and `patch_size` in pixels; those of every configuration.
        """
        self.encoder = encoder or {}
        self.head = head
        self.pooling = pooling
        super().__init__(**options)


class AlignedVisionModel(PreTrainedModel):  # type: ignore[misc]
    """Every token of an image through the head, as LLaVA wants them: a first token, then patches.

    What the head reads of a patch is the pooling of that patch alone: its token (`cls`, `mean`,
    `pooler`), the class token and it (`cls+mean`, as in SAIL), or it twice (`mean+max`). The first
    token, where the encoder has a class token, is the embedding of the image.
    """

    config_class = AlignedVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: AlignedVisionConfig) -> None:
        super().__init__(config)
        settings = dict(config.encoder)
        self.encoder = AutoModel.from_config(
            AutoConfig.for_model(settings.pop("model_type"), **settings)
        )
        head = config.head and HeadConfig.model_validate(config.head)
        self.head = HEADS[head.kind](config.feature_size, head) if head else torch.nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Float[Tensor, "batch 3 height width"],
        output_hidden_states: bool | int | list[int] | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Return the tokens of the layers that are asked for, each through the head.

        Args:
            pixel_values: Standardised as the folder's preprocessor_config.json says.
            output_hidden_states: Which layers, as LLaVA's `vision_feature_layer` names them. The
                head was trained on one: see `vision_feature_layer` of the folder's config.json.

        Raises:
            EncoderError: A layer is not there, or has another length than the head reads.
        """
        output = run_model(self.encoder, pixel_values, hidden=True)
        count = len(output.hidden_states)
        asked = [] if output_hidden_states in (None, False) else output_hidden_states
        asked = list(range(count)) if asked is True else asked
        asked = [asked] if isinstance(asked, int) else asked
        layers: list[Tensor | None] = [None] * count
        for layer in asked:
            if not -count <= layer < count:
                raise EncoderError(
                    f"vision_feature_layer is {layer}. One of the {count} of "
                    f"{type(self.encoder).__name__}, -{count} to {count - 1}, was expected. "
                    f"Correct it in config.json."
                )
            layers[layer] = self._aligned(output, layer - count if layer >= 0 else layer)
        last = layers[LAST]
        last = self._aligned(output, LAST) if last is None else last
        return BaseModelOutput(last_hidden_state=last, hidden_states=tuple(layers))

    def _aligned(self, output: Any, layer: int) -> Float[Tensor, "batch tokens dim"]:
        features = self._features(layer_tokens(self.encoder, output, layer))
        if features.shape[-1] != self.config.feature_size:
            raise EncoderError(
                f"vision_feature_layer is {layer}, whose features have length "
                f"{features.shape[-1]}. {self.config.feature_size} was expected, which the head "
                f"reads. Choose a layer of that length in config.json."
            )
        tokens: Tensor = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return tokens

    def _features(self, tokens: Tensor) -> Float[Tensor, "batch tokens feature_size"]:
        """Return what the head reads: of the image, if it has a class token, then of each patch."""
        if tokens.ndim == 4:  # a convolutional map
            return tokens.flatten(2).transpose(1, 2)
        patches = tokens[:, -((self.config.image_size // self.config.patch_size) ** 2) :]
        has_class_token = tokens.shape[1] > patches.shape[1]
        first, mean = tokens[:, :1], patches.mean(1, keepdim=True)
        if self.config.pooling == "cls+mean":
            wide = torch.cat([first.expand_as(patches), patches], dim=-1)
            return torch.cat([torch.cat([first, mean], dim=-1), wide], dim=1)
        if self.config.pooling == "mean+max":
            wide = torch.cat([patches, patches], dim=-1)
            first = torch.cat([mean, patches.amax(1, keepdim=True)], dim=-1)
        else:
            wide = patches
            first = mean if self.config.pooling == "mean" else first
        return torch.cat([first, wide], dim=1) if has_class_token else wide


AutoConfig.register(AlignedVisionConfig.model_type, AlignedVisionConfig)
AutoModel.register(AlignedVisionConfig, AlignedVisionModel)
