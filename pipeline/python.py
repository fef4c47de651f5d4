"""Opens a trained run, or an exported folder, from Python."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from align.checkpoint import CONFIG, load_head
from features.config import OWN
from features.errors import ConfigError
from features.storage.reading import Expected, checked, read_json
from pipeline.hub import fetched
from pipeline.run.aligned import Aligned
from pipeline.run.config import (
    SETTINGS_FILE,
    EncodersConfig,
    RunConfig,
    RunSettings,
    is_run,
    load_config,
)
from pipeline.run.device import prepare_device
from pipeline.run.folder import check_extracted

EXPORTED = "exported"
"""Where config.json of an exported folder says how the encoders are used."""
EXPECTED = Expected(
    "What `sail export` of this version writes", "Export the run again.", ConfigError
)
IMAGE, TEXT = "image_encoder", "text_encoder"
"""Folders of the encoders in it; they stand for them there, as a hub id does."""


def load_aligned(run: str | Path, device: str = "auto") -> Aligned:
    """Open a run of `sail align`, or a folder of `sail export --to hf`.

    Of a run it is the best head, with the encoders that its features were made by.

    Args:
        run: Folder of the run, such as `runs/demo`, or the exported folder; also where it lies on
            the hub, as `hf://owner/name`.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: the first GPU if there is one.

    Raises:
        ConfigError: It is neither, or the hub does not have it.
        CheckpointError: There is no trained head.
    """
    folder = fetched(str(run))
    if (exported := _read_exported(folder)) is not None:
        chosen = prepare_device(RunSettings(device=device))
        model, checkpoint = load_head(folder, chosen)
        return Aligned(exported.encoders, exported.max_pixels, checkpoint, model, chosen)
    config = open_run(folder, device)
    path = folder / "align" / config.eval.checkpoint
    if not path.exists():
        check_extracted(config)
    chosen = prepare_device(config.run)
    model, checkpoint = load_head(path, chosen)
    return Aligned.of_run(config, checkpoint, model, chosen)


def open_run(run: str | Path, device: str = "auto") -> RunConfig:
    """Return the settings of a run, wherever its folder is now.

    They are those that its head was trained with, but that splits and encoders are those of the
    extraction. An evaluation with other settings changes none of them. Takes what `load_aligned`
    does, but no exported folder.

    Raises:
        ConfigError: There is no `config.toml` of this program in the folder.
    """
    folder = Path(run)
    if not is_run(folder):
        raise ConfigError(
            f"{folder} has no config.toml: nothing was extracted there. A run, by its folder (such "
            f"as runs/demo) or run file, was expected. Correct the path, or begin the run by `sail "
            f"extract`, then `sail align`."
        )
    here = [f"run.dir={json.dumps(str(folder))}", f"run.device={device}"]
    trained = folder / "align" / SETTINGS_FILE
    config = load_config(str(trained if trained.is_file() else folder / SETTINGS_FILE), here)
    return _by_those_who_encoded(config, here)


def _by_those_who_encoded(config: RunConfig, here: list[str]) -> RunConfig:
    """Return settings with the splits and the encoders of the extraction that made the features.

    Where that is not known, as of stores from elsewhere, they stay.
    """
    path = (config.run.features or config.run.dir) / "features" / SETTINGS_FILE
    if not path.is_file():
        return config
    extracted = load_config(str(path), here)
    encoders = config.encoders.model_copy(
        update={
            "image": config.encoders.image | extracted.encoders.image,
            "text": config.encoders.text | extracted.encoders.text,
        }
    )
    extract = extracted.extract.model_copy(update={"store": config.extract.store})
    data = config.data | extracted.data
    return config.model_copy(update={"data": data, "encoders": encoders, "extract": extract})


class Exported(BaseModel):
    """How the encoders of an exported head are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoders: EncodersConfig
    max_pixels: PositiveInt


def _read_exported(folder: Path) -> Exported | None:
    """Read an exported folder; None if it is not one.

    Raises:
        ConfigError: It is one, but another version wrote it or it was changed.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    document: dict[str, Any] = read_json(path, dict[str, Any], EXPECTED)
    if EXPORTED not in document:
        return None
    exported: Exported = checked(document[EXPORTED], Exported, f"{EXPORTED} of {path}", EXPECTED)
    image, text = exported.encoders.image.values(), exported.encoders.text.values()
    models = [each.model for each in image] + [each.model for each in text]
    if own := [each for each in models if each.startswith(OWN)]:
        raise ConfigError(
            f"{path} names the encoder {own[0]!r}, which would run code. Only a run file of yours "
            f"may do that. Use the run itself."
        )
    return exported.model_copy(update={"encoders": _found(exported.encoders, folder)})


def _found(encoders: EncodersConfig, folder: Path) -> EncodersConfig:
    """Point the encoders that came along to their folders."""

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
