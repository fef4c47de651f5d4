"""Loads an encoder and fills its columns: the part of stage one that needs torch."""

import gc
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from features.encoders.backends import backend_of
from features.extract import ExtractOptions, Phases, extract
from features.index import Index
from features.storage.column import Column, pending_in_any
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.run.config import RunConfig
from pipeline.run.cpu import usable_processors
from pipeline.run.device import prepare_device
from pipeline.run.finished import check_quarantined, columns_of
from pipeline.run.time_split import TimeSplit

logger = logging.getLogger(__name__)
Splits = Sequence[tuple[FeatureStore, Index]]
Encoder = ImageEncoder | TextEncoder


KEPT_BYTES = 1 << 29
"""Of the weights of encoders that stay loaded between their trial and their work."""


class LoadedEncoders:
    """Loads the encoders of a recipe, and keeps small ones; of large ones the last."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._kept: dict[str, Encoder] = {}

    def get(self, name: str) -> Encoder:
        """Return `image/<encoder>` or `text/<encoder>`; large ones before it are let go first.

        Raises:
            EncoderError: It cannot be loaded.
        """
        if name not in self._kept:
            if sum(map(_weights_bytes, self._kept.values())) > KEPT_BYTES:
                self._kept.clear()
                gc.collect()
            self._kept[name] = load_encoder(self._config, name, prepare_device(self._config.run))
        return self._kept[name]


def _weights_bytes(encoder: Encoder) -> int:
    return sum(weight.nbytes for weight in encoder.model.parameters())


def fill_encoder(
    config: RunConfig, encoders: LoadedEncoders, splits: Splits, name: str, stop: StopRequest
) -> None:
    """Load an encoder, and fill its columns in every split.

    Args:
        config: Settings of the run.
        encoders: Loads it.
        splits: Store and index of every split.
        name: `image/<encoder>` or `text/<encoder>`.
        stop: Whether a signal came.

    Raises:
        Stopped: A signal came; what is done is on disk.
        SourceError: More rows are quarantined than the recipe allows.
    """
    encoder = encoders.get(name)
    add_columns((store for store, _ in splits), encoder)
    for store, index in splits:
        for names in columns_of(config, store, name):
            columns, phases = [store.column(each) for each in names], None
            if pending := pending_in_any(columns):
                phases = Phases()
                with progress_line(store, columns, pending) as line:
                    split = TimeSplit(config.run.dir, line, phases, of=_named(store, columns))
                    options = ExtractOptions(
                        workers=config.extract.workers or usable_processors(),
                        should_stop=stop,
                        on_rows=split.advance,
                        phases=phases,
                    )
                    extract(store, columns, index, encoder, options, pending)
                split.finish()
            finish_columns(config, store, columns, phases, stop)


def load_encoder(config: RunConfig, name: str, device: torch.device) -> Encoder:
    """Load `image/<encoder>` or `text/<encoder>` of a recipe."""
    kind, encoder = name.split("/")
    if kind == "image":
        settings, max_pixels = config.encoders.image[encoder], config.extract.max_pixels
        return load_image_encoder(encoder, settings, device, max_pixels)
    return load_text_encoder(encoder, config.encoders.text[encoder], device)


def add_columns(stores: Iterable[FeatureStore], encoder: Encoder) -> None:
    """Make the columns of an encoder, or check that those there are its own.

    Raises:
        StoreMismatchError: They were made by something else.
    """
    for store in stores:
        for name, fingerprint in encoder.fingerprints.items():
            store.add_encoder(name, fingerprint, dim=fingerprint["dim"])


def progress_line(
    store: FeatureStore, columns: Sequence[Column], chunks: Sequence[int]
) -> ProgressLine:
    """Return the line of progress over the rows of some chunks of some columns."""
    rows = sum(map(columns[0].chunk_rows, chunks))
    return ProgressLine("  ".join(_named(store, columns).values()), rows, "rows")


def _named(store: FeatureStore, columns: Sequence[Column]) -> dict[str, str]:
    return {"split": store.path.stem, "columns": ", ".join(column.name for column in columns)}


def finish_columns(
    config: RunConfig,
    store: FeatureStore,
    columns: Sequence[Column],
    phases: Phases | None,
    stop: StopRequest,
) -> None:
    """Account for every row of columns that were filled.

    Args:
        config: Settings of the run.
        store: Has the columns.
        columns: Those that were filled in one pass.
        phases: What it took; None where nothing was left to do.
        stop: Whether a signal came.

    Raises:
        Stopped: A signal came; what is done is on disk.
        SourceError: More rows are quarantined than the recipe allows.
    """
    if phases is not None:
        logger.info("%s  %s: %s", *_named(store, columns).values(), phases.summary())
    for column in columns:
        column.remove_leftovers()
    stop.check()
    for column in columns:
        check_quarantined(store, column.name, config.extract.max_bad_fraction)


def folder_of(config: RunConfig, name: str) -> Path | None:
    """Return where the files of an encoder are, None for one that has none."""
    kind, encoder = name.split("/")
    settings: ImageEncoderConfig | TextEncoderConfig = getattr(config.encoders, kind)[encoder]
    files = backend_of(settings.model).find(settings.model, settings.revision)
    return None if files is None else files.folder
