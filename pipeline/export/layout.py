"""The folder that `sail export --to hf` writes: what is called what in it.

    config.json         that of a checkpoint, and under `exported` how the encoders are used
    model.safetensors   the weights of both heads, scale and bias
    image_encoder/      of the frozen image encoder: its files, or only what describes it
    text_encoder/       of the frozen text encoder: the same
    README.md           the card

The names of the encoders' folders stand for them in config.json, as a hub id does.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from features.errors import ConfigError
from pipeline.run.config import EncodersConfig

CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
IMAGE, TEXT = "image_encoder", "text_encoder"
KEY = "exported"


class Exported(BaseModel):
    """How the encoders of an exported head are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoders: EncodersConfig
    max_pixels: PositiveInt


def read_exported(folder: Path) -> Exported | None:
    """Read an exported folder; None if it is not one.

    Raises:
        ConfigError: It is one, but another version wrote it or it was changed.
    """
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        written = document[KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        exported = Exported.model_validate(written)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(
            f"{folder / CONFIG} cannot be used: {KEY}.{'.'.join(map(str, fault['loc']))}: "
            f"{fault['msg']}. What `sail export` of this version writes was expected. Export the "
            f"run again."
        ) from None
    return exported.model_copy(update={"encoders": _found(exported.encoders, folder)})


def _found(encoders: EncodersConfig, folder: Path) -> EncodersConfig:
    """Say where the encoders are that came along."""

    def placed(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            name: each.model_copy(update={"model": str(folder / each.model)})
            if each.model in (IMAGE, TEXT)
            else each
            for name, each in settings.items()
        }

    return encoders.model_copy(
        update={"image": placed(encoders.image), "text": placed(encoders.text)}
    )
