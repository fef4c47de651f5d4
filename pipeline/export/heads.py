"""Heads of the paper's own code in and out of a run: `sail import-head`, `sail export-head`."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from align.checkpoint import CheckpointFolder, Snapshot, load_head
from align.columns import Columns
from align.heads import AlignmentModel, load_released, save_released
from align.trainer import describe
from features.errors import CheckpointError
from features.storage.column import Column
from pipeline.run.config import RunConfig
from pipeline.run.folder import open_stores, run_folder, start_run
from pipeline.run.model import export_model

logger = logging.getLogger(__name__)


def import_head(file: Path, config: RunConfig) -> Path:
    """Make a released head the checkpoint of a run, so that `sail eval` measures it.

    Args:
        file: A `.pt` file in the released layout.
        config: A recipe whose features are extracted; its encoders must be those of the head.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The file is no such head, its lengths are not those of the recipe's
            columns, or the run has a head already.
    """
    model, head = load_released(file)
    folder = run_folder(config)
    stores = open_stores(config, folder, config.trained_splits[0], 1.0)
    settings = config.align.model_copy(update={"head": head})
    image, text = config.aligned_encoder("image"), config.aligned_encoder("text")
    columns = Columns.open(stores, settings, image, text)
    for column, network in [(columns.image, model.image_head), (columns.text[0], model.text_head)]:
        _check_length(file, column, network)
    if (folder.align / "last").is_symlink():
        raise CheckpointError(
            f"{folder.align} has a head already. A run without one was expected. Give this run "
            f"another `run.dir`, or delete {folder.align}."
        )
    start_run(config)
    described = describe([columns], [1.0], settings, config.run.seed)
    described["imported"] = {"file": file.name, "sha256": _sha256(file)}
    checkpoints = CheckpointFolder(folder.align)
    checkpoints.resume(described)
    checkpoints.save(_snapshot(model, described), {}, None)
    export_model(checkpoints.best, folder.model)
    logger.info("%s: a %s head, scale %.4g", file, head.kind, model.log_scale.exp().item())
    return checkpoints.best


def export_head(checkpoint: Path, file: Path) -> Path:
    """Write the head of a checkpoint in the released layout.

    Args:
        checkpoint: Folder of a checkpoint, or of a run (its best one is taken).
        file: The `.pt` file to write.

    Raises:
        CheckpointError: There is no whole checkpoint, or the released code has no such head.
    """
    best = checkpoint / "align" / "best"
    model, found = load_head(best if best.exists() else checkpoint)
    save_released(model, found.head.kind, file, epoch=int(found.metadata["epoch"]))
    return file


def _check_length(file: Path, column: Column, network: torch.nn.Module) -> None:
    expected = int(network.get_parameter("norm.weight").shape[0])
    if column.dim != expected:
        raise CheckpointError(
            f"The head in {file} takes features of length {expected}, but {column.path} has "
            f"{column.dim}. The encoders that the head was trained on were expected. Choose them "
            f"in the recipe (model and pooling), and extract."
        )


def _snapshot(model: AlignmentModel, described: dict[str, Any]) -> Snapshot:
    metadata = {
        "step": 0,
        "total_steps": 0,
        "epoch": 0,
        "finished": True,
        "heldout": {},
        "best_step": 0,
        "best_score": None,
        "run": described,
    }
    return Snapshot(0, model.state_dict(), metadata)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
