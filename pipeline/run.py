"""What runs when: each stage reads what the one before it wrote, and does only what is missing."""

import logging
from dataclasses import dataclass
from pathlib import Path

from features.config import ScenesSource, Source, WebdatasetSource
from features.errors import ConfigError, SourceError
from features.index import Index
from features.partial import partial_path
from features.storage.place import Place
from features.store import FeatureStore, keys_digest
from pipeline.config import RunConfig, dump_config
from pipeline.finished import KnownEncoders, is_finished
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine, timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

    path: Path
    features: Path | None = None
    """Run folder whose index and features are used instead, if any."""
    stores: Place | None = None
    """Where the feature stores are, if not in the run folder."""

    def index(self, split: str) -> Path:
        """Index of a split."""
        return (self.features or self.path) / "index" / f"{split}.parquet"

    def store(self, split: str) -> Place:
        """Feature store of a split."""
        stores = self.stores or (self.features or self.path) / "features"
        return stores / f"{split}.zarr"

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


def start_run(config: RunConfig) -> RunFolder:
    """Make the run folder, and write the resolved settings there."""
    folder = RunFolder(config.run.dir, config.run.features, config.extract.store)
    folder.path.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder.path / "config.toml")
    partial.write_text(dump_config(config), encoding="utf-8")
    partial.replace(folder.path / "config.toml")
    return folder


def extract(config: RunConfig, stop: StopRequest) -> list[Place]:
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
    splits = []
    for split, source in config.data.items():
        index = build_index(folder, split, _drawn(folder, split, source))
        splits.append((_open_store(config, folder, split, index), index))
    stores = [store for store, _ in splits]
    known = KnownEncoders(folder.path / "encoders.json")
    columns = [
        (kind, name) for kind in ("image", "text") for name in getattr(config.encoders, kind)
    ]
    for kind, name in columns:
        if is_finished(config, known, stores, f"{kind}/{name}"):
            continue
        from pipeline.filling import fill_encoder  # torch loads here: a finished run does without

        fill_encoder(config, known, splits, f"{kind}/{name}", stop)
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
        if FeatureStore.is_at(folder.store(split)):
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
    if not FeatureStore.is_at(path):
        return FeatureStore.create(path, index, rows_per_chunk=config.extract.rows_per_chunk)
    store = FeatureStore.open(path)
    if store.rows != index.rows or store.keys_sha256 != keys_digest(index):
        raise SourceError(
            f"The store {path} has {store.rows} rows with keys {store.keys_sha256[:12]}…, the "
            f"index of {split!r} has {index.rows} others. The same rows were expected. Give this "
            f"run another `run.dir`, or delete {path} to extract again."
        )
    return store
