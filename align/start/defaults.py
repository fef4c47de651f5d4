"""Settings of a training that the run file leaves open: they follow from the number of rows.

What was measured is in docs/heads.md.
"""

import logging
from typing import Any

from pydantic import BaseModel

from align.config import AlignConfig, HeadConfig

logger = logging.getLogger(__name__)
DEEP_ROWS = 100_000
"""From so many rows on, what is not given is as in the preset `sail`; below, as measured."""
BATCH = 1024
SHORTCUTS = {"linear": False, "glu": True, "mlp": True}
"""The kinds of head that can start from the closed form, and whether beside their layers."""
EPOCHS, RATE, DROPOUT = 27.0, 1e-4, 0.2
"""From the closed form: passes over the rows, peak learning rate, and dropout of `glu`."""
FEW_ROWS = 1000
"""With fewer, the closed form is the result: steps from it made it worse on other rows. Where steps
are asked for all the same, their rate is lower in proportion to the rows."""


def settled(config: AlignConfig, *, rows: int, fits: int, dims: tuple[int, int]) -> AlignConfig:
    """Return the settings with all that was not given decided, and say in the log what was.

    Args:
        config: Settings; those that were given stay, but for a batch that is larger than the data.
        rows: Rows of the training.
        fits: The largest batch that the rows of every store fill in their proportion.
        dims: Lengths of an image feature and of a text feature.
    """
    kind = _kind(config.head, rows)
    start = _start(config, kind, rows)
    batch = _batch(config, rows, fits)
    changes: dict[str, Any] = {"start": start, "batch_size": batch}
    head: dict[str, Any] = {"kind": kind}
    rate: dict[str, Any] = {}
    if start == "cca":
        head["shortcut"] = SHORTCUTS[kind]
        from_rows = {"dim": min(config.head.dim, *dims), "dropout": DROPOUT * (kind == "glu")}
        head |= {name: each for name, each in from_rows.items() if not _gives(config.head, name)}
        if not _gives(config.optimizer, "learning_rate"):
            rate["learning_rate"] = float(f"{RATE * min(1.0, rows / FEW_ROWS):.2g}")
        if not _gives(config, "steps", "epochs"):
            changes |= {"epochs": EPOCHS} | ({"steps": 0} if rows < FEW_ROWS else {})
    changes["head"] = config.head.model_copy(update=head)
    changes["optimizer"] = config.optimizer.model_copy(update=rate)
    decided = config.model_copy(update=changes)
    _say(decided, rows)
    return decided


def left_open(config: AlignConfig) -> dict[str, Any]:
    """Return the settings that are decided by `settled`, as what pydantic leaves out of a dump."""
    names = {"batch_size", "epochs"} - config.model_fields_set
    head = {"kind", "dim", "dropout", "shortcut"} - config.head.model_fields_set
    rate = {"learning_rate"} - config.optimizer.model_fields_set
    return {**dict.fromkeys(names, True), "head": head, "optimizer": rate}


def _gives(section: BaseModel, *names: str) -> bool:
    """Whether the run file has one of these settings."""
    return bool(section.model_fields_set & set(names))


def _kind(head: HeadConfig, rows: int) -> str:
    is_chosen = _gives(head, "kind", "depth", "width", "dropout")  # the last three are of glu alone
    return "linear" if rows < DEEP_ROWS and not is_chosen else head.kind


def _start(config: AlignConfig, kind: str, rows: int) -> str:
    if config.start != "auto":
        return config.start
    own_rate = _gives(config.optimizer, "learning_rate")  # found for random weights
    return "cca" if rows < DEEP_ROWS and kind in SHORTCUTS and not own_rate else "random"


def _batch(config: AlignConfig, rows: int, fits: int) -> int:
    if not _gives(config, "batch_size"):
        return min(fits, BATCH if rows < DEEP_ROWS else config.batch_size)
    if config.batch_size > fits:
        what = "align.batch_size = %d is more than the %d rows to train on: lowered to %d"
        logger.warning(what, config.batch_size, rows, fits)
    return min(fits, config.batch_size)


def _say(config: AlignConfig, rows: int) -> None:
    head, steps = config.head, config.steps
    how = f"{config.epochs:g} epochs" if steps is None else f"{steps} steps"
    if steps == 0 and config.start == "cca":
        logger.info("%s rows: the closed form of a %s head is the result", f"{rows:,}", head.kind)
        return
    logger.info(
        "%s rows: a %s head of dim %d from %s weights, %s of %d, learning rate %g",
        f"{rows:,}",
        head.kind,
        head.dim,
        "the closed form's" if config.start == "cca" else "random",
        how,
        config.batch_size,
        config.optimizer.learning_rate,
    )
