"""`sail export --to llava`: the aligned image encoder as the vision tower of a LLaVA."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from align.tower import AlignedVisionConfig, AlignedVisionModel
from features.encoders.patches import patch_encoder
from features.errors import EncoderError
from features.partial import replacing_folder
from pipeline.handover.card import model_card
from pipeline.handover.layout import CARD
from pipeline.handover.parts import Parts
from pipeline.handover.snippet import TEMPLATES

logger = logging.getLogger(__name__)
PROCESSOR = "preprocessor_config.json"


def export_llava(parts: Parts, out: Path) -> Path:
    """Write the tower: config.json, safetensors, the processor's settings and a card.

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
    use = TEMPLATES.get_template("llava.md.j2").render(
        upright=parts.image.settings.upright, dim=parts.aligned.dim
    )
    with replacing_folder(out) as folder:
        tower.save_pretrained(folder)
        shutil.copyfile(parts.image.files.folder / PROCESSOR, folder / PROCESSOR)
        (folder / CARD).write_text(model_card(parts, use=use), encoding="utf-8")
    logger.info("exported a vision tower of %s to %s", parts.image.name, out)
    return out


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
