"""`sail export --to hf`: a folder in the manner of the hub, that loads without this program too."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from features.storage.files import replacing_folder
from pipeline.export.card import model_card
from pipeline.export.layout import CARD, CONFIG, IMAGE, KEY, MODEL, TEXT
from pipeline.export.parts import EncoderPart, Parts

logger = logging.getLogger(__name__)


def export_huggingface(parts: Parts, out: Path) -> Path:
    """Write the folder: all of it, or nothing. See `pipeline.export.layout` for what is in it.

    Raises:
        EncoderError: Weights of an encoder are not those that the head was trained on.
    """
    checkpoint = parts.aligned.checkpoint
    with replacing_folder(out) as folder:
        parts.image.copy_to(folder / IMAGE)
        parts.text.copy_to(folder / TEXT)
        shutil.copyfile(checkpoint.path / MODEL, folder / MODEL)
        if parts.results is not None:
            shutil.copyfile(parts.results, folder / parts.results.name)
        config = checkpoint.metadata | {KEY: _exported(parts)}
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        (folder / CARD).write_text(model_card(parts), encoding="utf-8")
    logger.info("exported the head of step %d to %s", checkpoint.step, out)
    return out


def _exported(parts: Parts) -> dict[str, Any]:
    return {
        "encoders": {
            "image": {parts.image.name: _settings(parts.image, IMAGE)},
            "text": {parts.text.name: _settings(parts.text, TEXT)},
        },
        "max_pixels": parts.aligned.max_pixels,
    }


def _settings(part: EncoderPart[Any], folder: str) -> dict[str, Any]:
    """Return the settings of an encoder, which is in the folder or on the hub."""
    is_fetched = part.on_hub and not part.with_weights
    place = (
        {"model": part.settings.model, "revision": part.fingerprint["revision"]}
        if is_fetched
        else {"model": folder, "revision": None}
    )
    settings: dict[str, Any] = part.settings.model_dump(mode="json") | place
    return {name: value for name, value in settings.items() if value is not None}
