"""`--to llava`: the aligned image encoder as the vision tower of a LLaVA."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModel, LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from align.heads import build_head
from features.encoders.patches import patch_encoder
from features.encoders.pooling import layer_tokens, run_model
from features.errors import EncoderError
from pipeline.card import TEMPLATES
from pipeline.export.parts import Parts

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
        feature_size, head = config.feature_size, config.head
        self.head = build_head(feature_size, **head) if head else torch.nn.Identity()
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


PROCESSOR = "preprocessor_config.json"


def write(parts: Parts, folder: Path) -> str:
    """Write the tower: config.json, safetensors, the processor's settings; return how it is used.

    Raises:
        EncoderError: The licence of the encoder is not known to allow a copy, or a patch has no
            place among the features that the head reads.
    """
    parts.image.check_copyable("A vision tower")
    config = _config(parts)
    tower = AlignedVisionModel(config).eval()
    encoder, head = parts.aligned.image_encoder, parts.aligned.model.image_head
    tower.encoder.load_state_dict(encoder.model.state_dict())
    tower.head.load_state_dict(head.state_dict())
    tower.save_pretrained(folder)
    shutil.copyfile(parts.image.files.folder / PROCESSOR, folder / PROCESSOR)
    return TEMPLATES.get_template("llava.md.j2").render(
        upright=parts.image.settings.upright, dim=parts.aligned.dim
    )


def llava_config(
    tower: AlignedVisionConfig, language_model: Any, *, image_token: int
) -> LlavaConfig:
    """Return the configuration of a LLaVA on this tower: layer, tokens and lengths are right.

    Args:
        tower: Of the exported folder.
        language_model: The configuration of any language model of transformers.
        image_token: Number of the token that stands for a piece of an image.
    """
    return LlavaConfig(
        vision_config=tower,
        text_config=language_model,
        image_token_index=image_token,
        image_seq_length=tower.patches,
        vision_feature_layer=tower.vision_feature_layer,
        vision_feature_select_strategy="default" if tower.has_class_token else "full",
    )


def _config(parts: Parts) -> AlignedVisionConfig:
    """Describe the tower; what the encoder gives for one image says how many tokens there are."""
    aligned = parts.aligned
    patches = patch_encoder(aligned.image_encoder, aligned.image_column)
    model: Any = aligned.image_encoder.model
    height, width = aligned.image_encoder.preprocessing.output_size
    if height != width:
        raise EncoderError(
            f"{parts.image.settings.model} reads images of {height} × {width} pixels. Square ones "
            f"were expected in LLaVA. Choose another encoder."
        )
    count = (height // patches.patch) * (width // patches.patch)
    return AlignedVisionConfig(
        encoder=json.loads(model.config.to_json_string(use_diff=False)),
        head=aligned.checkpoint.head.model_dump(),
        pooling=parts.image.settings.pooling,
        hidden_size=aligned.dim,
        feature_size=aligned.checkpoint.image["dim"],
        image_size=height,
        patch_size=patches.patch,
        patches=count,
        has_class_token=_has_class_token(aligned.image_encoder, count),
        vision_feature_layer=parts.image.settings.layer,
    )


def _has_class_token(encoder: Any, patches: int) -> bool:
    blank = torch.zeros(1, 3, *encoder.preprocessing.output_size)
    with torch.inference_mode():
        last = encoder.model(blank).last_hidden_state
    return bool(last.ndim == 3 and last.shape[1] > patches)
