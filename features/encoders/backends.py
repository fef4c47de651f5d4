"""The backends of frozen encoders, by what stands before the colon in the name of a model."""

import logging
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import (
    baselines,
    open_clip_models,
    own_functions,
    pretrained,
    static_embeddings,
    timm_models,
    vectors,
)
from features.encoders.checkpoint import EncoderFiles, layouts_of
from features.encoders.plan import EncoderPlan
from features.encoders.text import TextEncoder

logger = logging.getLogger(__name__)


@runtime_checkable
class EncoderBackend(Protocol):
    """A module that loads frozen models of one kind."""

    @property
    def IMAGES(self) -> str | None:  # noqa: N802 - a constant of the module
        """How `model` of an image encoder is written; None if it has none."""

    @property
    def TEXTS(self) -> str | None:  # noqa: N802
        """The same for a text encoder."""

    def find(
        self, model: str, revision: str | None, *, weights: bool = True
    ) -> EncoderFiles | None:
        """Return the files of a model, fetched where they are not here; None if it has none."""

    def is_here(self, model: str, revision: str | None) -> bool:
        """Return whether a model can be loaded without the network."""

    def missing(self, model: str) -> tuple[bool, str, str]:
        """Of a model that is not here: whether it can be fetched, what to say, and what to do."""

    def resolve(self, config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
        """Decide how an encoder is used, without reading its weights."""

    def load_image(
        self, config: ImageEncoderConfig, poolings: frozenset[str]
    ) -> tuple[nn.Module, Any, dict[str, Any]]:
        """Return a model, what prepares its pictures, and what identifies it."""

    def load_text(self, name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
        """Load a text encoder, ready to encode."""


ENCODERS: dict[str, EncoderBackend] = {
    "": pretrained,
    "bundled": pretrained,
    "baseline": baselines,
    "timm": timm_models,
    "open_clip": open_clip_models,
    "model2vec": static_embeddings,
    "python": own_functions,
    "vectors": vectors,
}


def backend_of(model: str) -> EncoderBackend:
    """Return the backend that a model belongs to: by its prefix, or by the files of its folder."""
    prefix, colon, _ = model.partition(":")
    if not colon:
        found = [ENCODERS[name] for name in layouts_of(Path(model).expanduser())]
        return found[0] if len(found) == 1 else pretrained
    return ENCODERS.get(prefix, pretrained)


def models(kind: str) -> str:
    """Say how `model` of an encoder of images or texts can be written.

    Args:
        kind: `IMAGES` or `TEXTS`.
    """
    backends = dict.fromkeys(ENCODERS.values())
    return ", ".join(words for each in backends if (words := getattr(each, kind)))


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Decide how an encoder is used: the recipe first, then its own files, then its type.

    Raises:
        EncoderError: It cannot be found, is damaged, or nothing says how it is used.
    """
    return backend_of(config.model).resolve(config)


def tell(name: str, plan: EncoderPlan) -> None:
    """Warn where the recipe contradicts the model's own files, and say what was changed."""
    if plan.contradictions:
        logger.warning("%s: %s; the recipe is followed", name, "; ".join(plan.contradictions))
    for note in plan.notes:
        logger.info("%s: %s", name, note)


def load_text_encoder(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Load a frozen text encoder, ready to encode.

    Raises:
        EncoderError: It cannot be found or loaded, has no such pooling, or reads fewer tokens.
    """
    encoder = backend_of(config.model).load_text(name, config, device)
    if encoder.plan is not None:
        tell(f"text/{name}", encoder.plan)
    licence = str(encoder.fingerprint["licence"] or "")
    if "nc" in licence.lower().split("-"):
        logger.warning(
            "%s has the licence %s: its features are for non-commercial use", config.model, licence
        )
    return encoder
