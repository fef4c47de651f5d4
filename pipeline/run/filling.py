"""Loads an encoder and fills its columns: the part of stage one that needs torch."""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from features.encoders.checkpoint import find_encoder
from features.encoders.image import BASELINES
from features.extract import Phases, Run, extract_captions, extract_images
from features.index import Index
from features.store import ColumnGroup, FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.run.config import RunConfig
from pipeline.run.cpu import usable_processors
from pipeline.run.device import prepare_device
from pipeline.run.finished import KnownEncoders, check_quarantined, columns_of

logger = logging.getLogger(__name__)
Splits = Sequence[tuple[FeatureStore, Index]]
Encoder = ImageEncoder | TextEncoder


def fill_encoder(
    config: RunConfig, known: KnownEncoders, splits: Splits, name: str, stop: StopRequest
) -> None:
    """Load an encoder, and fill its columns in every split.

    Args:
        config: Settings of the run.
        known: Is told what the encoder is.
        splits: Store and index of every split.
        name: `image/<encoder>` or `text/<encoder>`.
        stop: Whether a signal came.

    Raises:
        Stopped: A signal came; what is done is on disk.
        SourceError: More rows are quarantined than the recipe allows.
    """
    encoder = load_encoder(config, name, prepare_device(config.run))
    known.remember(name, config, folder_of(config, name), encoder.fingerprints)
    add_columns((store for store, _ in splits), encoder)
    for store, index in splits:
        for names in columns_of(config, store, name):
            columns = ColumnGroup.open(store, names)
            fill = functools.partial(encode_chunks, store, index, encoder, columns)
            fill_columns(config, store, columns, fill, stop)


def load_encoder(config: RunConfig, name: str, device: torch.device) -> Encoder:
    """Load `image/<encoder>` or `text/<encoder>` of a recipe."""
    kind, encoder = name.split("/")
    if kind == "image":
        return load_image_encoder(encoder, config.encoders.image[encoder], device)
    return load_text_encoder(encoder, config.encoders.text[encoder], device)


def add_columns(stores: Iterable[FeatureStore], encoder: Encoder) -> None:
    """Make the columns of an encoder, or check that those there are its own.

    Raises:
        StoreMismatchError: They were made by something else.
    """
    for store in stores:
        for name, fingerprint in encoder.fingerprints.items():
            store.add_encoder(name, fingerprint, dim=fingerprint["dim"])


def encode_chunks(
    store: FeatureStore,
    index: Index,
    encoder: Encoder,
    columns: ColumnGroup,
    run: Run,
    chunks: Sequence[int] | None = None,
) -> Phases:
    """Fill the pending ones of some chunks of a group of columns; of all if not given."""
    if isinstance(encoder, ImageEncoder):
        return extract_images(columns, index, encoder, run, chunks)
    (column,) = columns
    return extract_captions(store, column, index, encoder, run, chunks)


def fill_columns(
    config: RunConfig,
    store: FeatureStore,
    columns: ColumnGroup,
    fill: Callable[[Run], Phases],
    stop: StopRequest,
) -> None:
    """Fill what is pending of some columns, with a line of progress, and account for every row.

    Raises:
        Stopped: A signal came; what is done is on disk.
        SourceError: More rows are quarantined than the recipe allows.
    """
    pending = columns.pending()
    if pending:
        split = store.path.stem
        rows = sum(columns.chunk_rows(chunk) for chunk in pending)
        with ProgressLine(f"{split}  {columns.name}", rows, "rows") as line:
            phases = fill(
                Run(
                    workers=config.extract.workers or usable_processors(),
                    max_pixels=config.extract.max_pixels,
                    should_stop=stop,
                    on_rows=line.advance,
                )
            )
        logger.info("%s  %s: %s", split, columns.name, phases.summary())
    columns.remove_leftovers()
    stop.check()
    for column in columns:
        check_quarantined(store, column.name, config.extract.max_bad_fraction)


def folder_of(config: RunConfig, name: str) -> Path | None:
    """Return where the files of an encoder are, None for one that has none."""
    kind, encoder = name.split("/")
    settings: ImageEncoderConfig | TextEncoderConfig = getattr(config.encoders, kind)[encoder]
    if settings.model in BASELINES:
        return None
    return find_encoder(settings.model, settings.revision).folder
