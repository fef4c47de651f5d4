"""Loads an encoder and fills its columns: the part of stage one that needs torch."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import load_image_encoder, load_text_encoder
from features.encoders.baselines import BASELINES
from features.encoders.checkpoint import find_encoder
from features.extract import Phases, Run, extract_captions
from features.extract_images import extract_images
from features.index import Index
from features.store import FeatureStore
from pipeline.config import RunConfig
from pipeline.device import prepare_device
from pipeline.finished import KnownEncoders, check_quarantined
from pipeline.interrupt import Stopped, StopRequest
from pipeline.progress import ProgressLine

logger = logging.getLogger(__name__)
Splits = Sequence[tuple[FeatureStore, Index]]


def fill_image_column(
    config: RunConfig, known: KnownEncoders, splits: Splits, name: str, stop: StopRequest
) -> None:
    """Load an image encoder, and fill its column in every split.

    Raises:
        Stopped: A signal came; what is done is on disk.
        SourceError: More rows are quarantined than the recipe allows.
    """
    settings = config.encoders.image[name]
    encoder = load_image_encoder(name, settings, prepare_device(config.run))
    known.remember(f"image/{name}", config, _folder(settings), encoder.fingerprint)
    for store, index in splits:
        store.add_encoder(f"image/{name}", encoder.fingerprint, dim=encoder.dim)

        def fill(run: Run, store: FeatureStore = store, index: Index = index) -> Phases:
            return extract_images(store.column(f"image/{name}"), index, encoder, run)

        _fill_column(config, store, f"image/{name}", fill, stop)


def fill_text_columns(
    config: RunConfig, known: KnownEncoders, splits: Splits, name: str, stop: StopRequest
) -> None:
    """Load a text encoder, and fill the column of each caption field in every split.

    Raises:
        Stopped: A signal came; what is done is on disk.
        SourceError: More rows are quarantined than the recipe allows.
    """
    settings = config.encoders.text[name]
    encoder = load_text_encoder(name, settings, prepare_device(config.run))
    known.remember(f"text/{name}", config, _folder(settings), encoder.fingerprint)
    for store, index in splits:
        store.add_encoder(f"text/{name}", encoder.fingerprint, dim=encoder.dim)
        for field in store.fields:
            column = store.column(f"text/{name}/{field}")

            def fill(run: Run, store: FeatureStore = store, index: Index = index) -> Phases:
                return extract_captions(store, column, index, encoder, run)  # noqa: B023

            _fill_column(config, store, column.name, fill, stop)


def _folder(settings: ImageEncoderConfig | TextEncoderConfig) -> Path | None:
    """Return where the files of an encoder are, None for one that has none."""
    if settings.model in BASELINES:
        return None
    return find_encoder(settings.model, settings.revision).folder


def _fill_column(
    config: RunConfig,
    store: FeatureStore,
    name: str,
    fill: Callable[[Run], Phases],
    stop: StopRequest,
) -> None:
    """Fill what is pending of a column, with a line of progress, and account for every row."""
    column = store.column(name)
    pending = column.pending()
    if pending:
        split = store.path.stem
        rows = sum(column.chunk_rows(chunk) for chunk in pending)
        with ProgressLine(f"{split}  {name}", rows, "rows") as line:
            phases = fill(
                Run(
                    workers=config.extract.workers or os.cpu_count() or 1,
                    max_pixels=config.extract.max_pixels,
                    should_stop=stop,
                    on_rows=line.advance,
                )
            )
        logger.info("%s  %s: %s", split, name, phases.summary())
    column.remove_leftovers()
    if stop():
        raise Stopped
    check_quarantined(store, name, config.extract.max_bad_fraction)
