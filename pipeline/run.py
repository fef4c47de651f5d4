"""What runs when: each stage reads what the one before it wrote, and does only what is missing."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from features.config import ScenesSource, Source, WebdatasetSource
from features.encoders import load_image_encoder, load_text_encoder
from features.errors import ConfigError, SourceError
from features.extract import Phases, Run, extract_captions
from features.extract_images import extract_images
from features.index import Index
from features.status import Status
from features.store import FeatureStore, keys_digest
from pipeline.config import RunConfig, dump_config
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine, timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

    path: Path
    features: Path | None = None
    """Run folder whose index and features are used instead, if any."""

    def index(self, split: str) -> Path:
        """Index of a split."""
        return (self.features or self.path) / "index" / f"{split}.parquet"

    def store(self, split: str) -> Path:
        """Feature store of a split."""
        return (self.features or self.path) / "features" / f"{split}.zarr"

    @property
    def align(self) -> Path:
        """Checkpoints and metrics of the head."""
        return self.path / "align"

    @property
    def eval(self) -> Path:
        """Results and report."""
        return self.path / "eval"

    @property
    def model(self) -> Path:
        """The exported head."""
        return self.path / "model"


class Stopped(Exception):  # noqa: N818 - not an error: a signal asked for it
    """The run stopped at a safe moment because a signal asked it to."""


def start_run(config: RunConfig) -> RunFolder:
    """Make the run folder, write the resolved settings there, and set the threads."""
    folder = RunFolder(config.run.dir, config.run.features)
    folder.path.mkdir(parents=True, exist_ok=True)
    partial = folder.path / ".config.toml.partial"
    partial.write_text(dump_config(config), encoding="utf-8")
    partial.replace(folder.path / "config.toml")
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return folder


def choose_device(name: str) -> torch.device:
    """Return the device of the setting `run.device`."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def extract(config: RunConfig, stop: StopRequest) -> list[Path]:
    """Run stage one for every split and encoder of the recipe; return the stores.

    Raises:
        Stopped: A signal came; what is done is on disk and the next call goes on from there.
    """
    if config.run.features is not None:
        raise ConfigError(
            f"run.features = {config.run.features} says that the features of another run are used. "
            f"Nothing to extract was expected. Call `sail align`, or leave run.features out."
        )
    folder = start_run(config)
    stores = []
    for split, source in config.data.items():
        index = build_index(folder, split, _drawn(folder, split, source))
        stores.append(_open_store(config, folder, split, index))
    columns = [
        (kind, name) for kind in ("image", "text") for name in getattr(config.encoders, kind)
    ]
    for kind, name in columns:
        if kind == "image":
            _extract_image_column(config, folder, stores, name, stop)
        else:
            _extract_text_columns(config, folder, stores, name, stop)
    return [store.path for store in stores]


def build_index(folder: RunFolder, split: str, source: Source) -> Index:
    """Open the index of a split, or build it from its source.

    Raises:
        SourceError: A shard changed since the index was built.
    """
    path = folder.index(split)
    if path.is_file():
        index = Index.open(path)
        if index.matches(source):
            index.check_shards()
            return index
        if folder.store(split).exists():
            raise SourceError(
                f"The run folder {folder.path} was made from another source of {split!r}. The "
                f"settings of [data.{split}] when it was made were expected. Give this run another "
                f"`run.dir`, or delete {path} and {folder.store(split)}."
            )
    with ProgressLine(f"index {split}", None, "samples") as line:
        index = Index.build(source, path, on_progress=line.advance)
    for what, count in index.counts.items():
        logger.info("index %s: %s: %d", split, what, count)
    return index


def _drawn(folder: RunFolder, split: str, source: Source) -> Source:
    """Draw the shards of the demo world, where that is the source; leave any other as it is."""
    if not isinstance(source, ScenesSource):
        return source
    from features.scenes.shards import write_shards

    shards = folder.path / "shards" / split
    with timed(f"drawing {source.rows} scenes for {split}"):
        write_shards(shards, split=source.split, rows=source.rows, seed=source.seed)
    return WebdatasetSource(
        kind="webdataset",
        path=str(shards / "*.tar"),
        captions=("short", "long"),
        class_names=shards / "classes.txt",
    )


def _open_store(config: RunConfig, folder: RunFolder, split: str, index: Index) -> FeatureStore:
    path = folder.store(split)
    if not path.exists():
        return FeatureStore.create(path, index, rows_per_chunk=config.extract.rows_per_chunk)
    store = FeatureStore.open(path)
    if store.rows != index.rows or store.keys_sha256 != keys_digest(index):
        raise SourceError(
            f"The store {path} has {store.rows} rows with keys {store.keys_sha256[:12]}…, the "
            f"index of {split!r} has {index.rows} others. The same rows were expected. Give this "
            f"run another `run.dir`, or delete {path} to extract again."
        )
    return store


def _extract_image_column(
    config: RunConfig, folder: RunFolder, stores: list[FeatureStore], name: str, stop: StopRequest
) -> None:
    encoder = load_image_encoder(
        name, config.encoders.image[name], choose_device(config.run.device)
    )
    for store in stores:
        store.add_encoder(f"image/{name}", encoder.fingerprint, dim=encoder.dim)
        index = Index.open(folder.index(_split(store)))

        def fill(run: Run, store: FeatureStore = store, index: Index = index) -> Phases:
            return extract_images(store.column(f"image/{name}"), index, encoder, run)

        _fill_column(config, store, f"image/{name}", fill, stop)


def _extract_text_columns(
    config: RunConfig, folder: RunFolder, stores: list[FeatureStore], name: str, stop: StopRequest
) -> None:
    encoder = load_text_encoder(name, config.encoders.text[name], choose_device(config.run.device))
    for store in stores:
        store.add_encoder(f"text/{name}", encoder.fingerprint, dim=encoder.dim)
        index = Index.open(folder.index(_split(store)))
        for field in store.fields:
            column = store.column(f"text/{name}/{field}")

            def fill(run: Run, store: FeatureStore = store, index: Index = index) -> Phases:
                return extract_captions(store, column, index, encoder, run)  # noqa: B023

            _fill_column(config, store, column.name, fill, stop)


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
        rows = sum(column.chunk_rows(chunk) for chunk in pending)
        with ProgressLine(f"{_split(store)}  {name}", rows, "rows") as line:
            phases = fill(
                Run(
                    workers=config.extract.workers or os.cpu_count() or 1,
                    max_pixels=config.extract.max_pixels,
                    should_stop=stop,
                    on_rows=line.advance,
                )
            )
        logger.info("%s  %s: %s", _split(store), name, phases.summary())
    if stop():
        raise Stopped
    bad = int(np.count_nonzero(column.status() != Status.OK))
    if bad > config.extract.max_bad_fraction * store.rows:
        raise SourceError(
            f"{bad} of {store.rows} rows of {store.path}/{name} are quarantined. At most "
            f"extract.max_bad_fraction = {config.extract.max_bad_fraction} of them was expected. "
            f"See why with `sail inspect {store.path}`."
        )


def _split(store: FeatureStore) -> str:
    return store.path.stem
