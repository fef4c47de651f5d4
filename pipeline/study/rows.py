"""The rows on which all encoders of a study are compared: those that every one of them has."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from align.selection import Columns, select_rows
from features.errors import ConfigError, EvaluationError
from features.status import Status
from features.store import FeatureStore
from pipeline.config import RunConfig
from pipeline.embedding.rows import complete_column
from pipeline.run import run_folder
from pipeline.stores import open_evaluated

LEAST_SCORED = 10


@dataclass(frozen=True)
class StudyRows:
    """Rows of one store, and their captions that can be used."""

    store: FeatureStore
    fields: tuple[str, ...]
    rows: Int64[np.ndarray, "rows"]
    """In order."""
    text_ok: Bool[np.ndarray, "rows fields"]
    """Usable by every text encoder."""

    @property
    def sha256(self) -> str:
        """Of what decides which items are scored."""
        digest = hashlib.sha256(f"{self.store.keys_sha256} {self.fields}".encode())
        digest.update(self.rows.astype("<i8").tobytes())
        digest.update(self.text_ok.tobytes())
        return digest.hexdigest()


def scored_rows(config: RunConfig, split: str | None) -> StudyRows:
    """Return the rows that alignment is scored on: of a split, or those that training holds out.

    Raises:
        ConfigError: Nothing is held out, or several splits are mixed.
        EvaluationError: Too few rows are usable by every encoder.
    """
    if config.align.mix:
        raise ConfigError(
            "align.mix names several splits. One was expected, on which all pairs are trained. "
            "Set align.split instead."
        )
    if split is None and config.align.holdout == 0:
        raise ConfigError(
            "align.holdout = 0 leaves no rows to score the pairs on. A fraction above 0 was "
            "expected. Set align.holdout, or name a split with --on."
        )
    if split is not None and (split not in config.data or split == config.align.split):
        raise ConfigError(
            f"--on {split} is no split to score on. One of [data] that is not trained on was "
            f"expected: {[name for name in config.data if name != config.align.split]}. Correct it."
        )
    found = usable_rows(config, split or config.align.split)
    if split is None:
        image, text = config.encoders.image_columns[0], next(iter(config.encoders.text))
        selection = select_rows(
            Columns.open(found.store, config.align, image, text),
            holdout=config.align.holdout,
            holdout_rows=config.align.holdout_rows,
        )
        kept = np.isin(found.rows, selection.heldout)
        found = StudyRows(found.store, found.fields, found.rows[kept], found.text_ok[kept])
    if len(found.rows) < LEAST_SCORED:
        raise EvaluationError(
            f"{found.store.path} has {len(found.rows)} rows to score on. At least {LEAST_SCORED} "
            f"that every encoder has were expected. Raise align.holdout, or name a split with --on."
        )
    return found


def usable_rows(config: RunConfig, split: str) -> StudyRows:
    """Return the rows of a split whose image, and at least one caption, every encoder has.

    Raises:
        ConfigError: The recipe has no image or no text encoder.
        EvaluationError: A column is not complete.
    """
    encoders = config.encoders
    if not encoders.image_columns or not encoders.text:
        raise ConfigError(
            "The recipe has no image or no text encoder. Candidates of both kinds were expected. "
            "Add them under [encoders], and run `sail extract`."
        )
    store = open_evaluated(config, run_folder(config), split)
    fields = tuple(config.align.fields or store.fields)
    if not fields:
        raise EvaluationError(
            f"{store.path} has no captions. Pairs were expected. Name another split."
        )
    ok = np.ones(store.rows, dtype=bool)
    for image in encoders.image_columns:
        ok &= complete_column(store, f"image/{image}").status() == Status.OK
    text_ok = np.ones((store.rows, len(fields)), dtype=bool)
    for text in encoders.text:
        for place, field in enumerate(fields):
            column = complete_column(store, f"text/{text}/{field}")
            text_ok[:, place] &= column.status() == Status.OK
    rows = np.flatnonzero(ok & text_ok.any(axis=1))
    return StudyRows(store, fields, rows, text_ok[rows])
