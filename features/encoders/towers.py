"""Models of two towers: which classes of transformers load one tower alone, and its projection."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    MetaClip2TextModel,
    MetaClip2TextModelWithProjection,
    MetaClip2VisionModel,
    MetaClip2VisionModelWithProjection,
    SiglipTextModel,
    SiglipVisionModel,
)


@dataclass(frozen=True)
class Tower:
    """One tower of a type of models."""

    plain: Any
    """The class that gives tokens and `pooler_output`."""
    projected: Any = None
    """The class that gives `image_embeds` or `text_embeds`; None where the pooler is the joint
    space."""

    @property
    def pooling(self) -> str:
        """What leads to the space that both towers share."""
        return "pooler" if self.projected is None else "projection"


CLIP_IMAGE = Tower(CLIPVisionModel, CLIPVisionModelWithProjection)
CLIP_TEXT = Tower(CLIPTextModel, CLIPTextModelWithProjection)
METACLIP_IMAGE = Tower(MetaClip2VisionModel, MetaClip2VisionModelWithProjection)
METACLIP_TEXT = Tower(MetaClip2TextModel, MetaClip2TextModelWithProjection)
# By the type of the whole model, and of a tower that was saved alone.
IMAGE_TOWERS = {
    "clip": CLIP_IMAGE,
    "clip_vision_model": CLIP_IMAGE,
    "metaclip_2": METACLIP_IMAGE,
    "metaclip_2_vision_model": METACLIP_IMAGE,
    "siglip": Tower(SiglipVisionModel),
    "siglip_vision_model": Tower(SiglipVisionModel),
}
TEXT_TOWERS = {
    "clip": CLIP_TEXT,
    "clip_text_model": CLIP_TEXT,
    "metaclip_2": METACLIP_TEXT,
    "metaclip_2_text_model": METACLIP_TEXT,
    "siglip": Tower(SiglipTextModel),
    "siglip_text_model": Tower(SiglipTextModel),
}


def tower_config(config: Any, kind: str) -> Any:
    """Return the configuration of one tower, `vision` or `text`, of a whole model, or its own."""
    own = getattr(config, f"{kind}_config", None)
    if own is None:
        return config
    if (width := getattr(config, "projection_dim", None)) is not None:
        own.projection_dim = width  # the whole model goes by its own
    own._attn_implementation = None
    return own


def own_pooling(tower: Tower, config: Any) -> str:
    """Return the pooling of a tower: the joint space, unless it was saved alone without it."""
    architectures = getattr(config, "architectures", None) or []
    is_whole = hasattr(config, "text_config") or hasattr(config, "vision_config")
    if is_whole or any(str(each).endswith("WithProjection") for each in architectures):
        return tower.pooling
    return "pooler"
