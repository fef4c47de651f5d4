"""Writes a run in the form that is asked for, where nothing else may be lost."""

import logging
from importlib import import_module
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

from features.errors import CheckpointError, ConfigError
from features.storage.files import remove_leftovers, replacing_folder, without_empty_folders
from pipeline.card import CARD
from pipeline.export import FORMS
from pipeline.export.parts import Parts, parts_of

logger = logging.getLogger(__name__)
MARK = "---\ntags: [sail, "
"""How every card begins."""


def export_run(run: Path, form: str, out: Path, *, with_encoders: bool = False) -> Path:
    """Write a trained run as a folder that other programs open.

    Args:
        run: Folder of the run.
        form: A key of `FORMS`.
        out: The folder to write; an earlier export is replaced, as a whole.
        with_encoders: As for `parts_of`.

    Raises:
        ConfigError: There is no run, something else lies at `out`, or a package is not installed.
        CheckpointError: There is no trained head, or it cannot be written in this form.
        EncoderError: An encoder cannot be handed over.
    """
    _check_free(out)
    module = import_module(f"pipeline.export.{FORMS[form]}")
    parts = parts_of(run, with_encoders=with_encoders)
    with without_empty_folders(out):
        remove_leftovers(out.parent)
        _write(parts, module, out)
    logger.info("exported the head of step %d to %s", parts.aligned.checkpoint.step, out)
    return out


def _write(parts: Parts, module: ModuleType, out: Path) -> None:
    try:
        with replacing_folder(out) as folder:
            use: str = module.write(parts, folder)
            (folder / CARD).write_text(parts.card(use), encoding="utf-8")
    except SafetensorError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error}. Room on the disk was expected, where it can be "
            f"written. Make room, and export again; what was there before is still there."
        ) from error


def _check_free(out: Path) -> None:
    """Check that nothing would be replaced but an earlier export."""
    card = out / CARD
    is_export = card.is_file() and card.read_bytes().startswith(MARK.encode())
    if out.exists() and not is_export and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out} is there already, and is no exported model. A new path, an empty folder or an "
            f"earlier export was expected. Choose another --out."
        )
