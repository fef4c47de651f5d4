"""Writes a run in the form that is asked for, where nothing else may be lost."""

from collections.abc import Callable
from pathlib import Path

from features.errors import ConfigError
from pipeline.export.huggingface import export_huggingface
from pipeline.export.layout import CARD
from pipeline.export.llava import export_llava
from pipeline.export.onnx import export_onnx
from pipeline.export.open_clip import export_open_clip
from pipeline.export.parts import Parts, parts_of
from pipeline.export.sentence_transformers import export_sentence_transformers

WRITERS: dict[str, Callable[[Parts, Path], Path]] = {
    "hf": export_huggingface,
    "llava": export_llava,
    "onnx": export_onnx,
    "open_clip": export_open_clip,
    "sentence-transformers": export_sentence_transformers,
}
MARK = "---\ntags: [sail, "
"""How every card begins."""


def export_run(run: Path, form: str, out: Path, *, with_encoders: bool = False) -> Path:
    """Write a trained run as a folder that other programs open.

    Args:
        run: Folder of the run.
        form: A key of `WRITERS`.
        out: The folder to write; an earlier export is replaced, as a whole.
        with_encoders: As for `parts_of`.

    Raises:
        ConfigError: There is no run, or something else lies at `out`.
        CheckpointError: There is no trained head.
        EncoderError: An encoder cannot be handed over.
    """
    _check_free(out)
    return WRITERS[form](parts_of(run, with_encoders=with_encoders), out)


def _check_free(out: Path) -> None:
    """Check that nothing would be replaced but an earlier export."""
    card = out / CARD
    is_export = card.is_file() and card.read_bytes().startswith(MARK.encode())
    if out.exists() and not is_export and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out} is there already, and is no exported model. A new path, an empty folder or an "
            f"earlier export was expected. Choose another --out."
        )
