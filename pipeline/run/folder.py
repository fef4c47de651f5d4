"""Which stores are trained on and measured: the run's own, or those that settings name instead."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align.columns import JoinedStore
from features.errors import ConfigError, TrainingError
from features.storage.files import is_file, write
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.run.config import RunConfig, dump_config


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


def run_folder(config: RunConfig) -> RunFolder:
    """Return where a run keeps what, without making anything."""
    return RunFolder(config.run.dir, config.run.features, config.extract.store)


def start_run(config: RunConfig) -> RunFolder:
    """Make the run folder, and write the resolved settings there.

    Commands that may refuse the settings call this once they have not.
    """
    folder = run_folder(config)
    path, content = folder.path / "config.toml", dump_config(config).encode()
    if not (path.is_file() and path.read_bytes() == content):  # a finished run may be read-only
        write(path, content)
    return folder


def open_store(config: RunConfig, folder: RunFolder, split: str) -> FeatureStore:
    """Open the store of a split, with its texts from elsewhere where the settings say so.

    A single store that is named holds the split that is trained on; the folder of a run may hold
    others too. A split that is not there is the run's own.

    Raises:
        ConfigError: One store is named for several splits.
        StoreError: There is no store.
        TrainingError: The texts are not those of the same rows.
    """
    store = FeatureStore.open(_named(config, "store", split) or folder.store(split))
    texts = _named(config, "text_store", split)
    return store if texts is None else JoinedStore(store, FeatureStore.open(texts))


def check_complete(store: FeatureStore, config: RunConfig, image: str, text: str) -> None:
    """Refuse columns of which not every chunk is done.

    Raises:
        StoreError: There is no such column.
        TrainingError: There are pending chunks.
    """
    used = [field for field in store.fields if field in (config.align.fields or store.fields)]
    for name in [f"image/{image}", *(f"text/{text}/{field}" for field in used)]:
        column = store.column(name)
        if pending := column.pending():
            raise TrainingError(
                f"{column.path} has {len(pending)} chunks that are not done. Finish it with `sail "
                f"extract`."
            )


def _named(config: RunConfig, setting: Literal["store", "text_store"], split: str) -> Place | None:
    """Return the store that a setting names: itself, or that of a split in the folder of a run.

    Of a split that is not trained on it may have none.
    """
    path: Place | None = getattr(config.align, setting)
    if path is None:
        return None
    is_trained = split in config.trained_splits
    if not is_file(path / "zarr.json"):
        place = path / "features" / f"{split}.zarr"
        return place if is_trained or FeatureStore.is_at(place) else None
    if len(config.align.mix) > 1:
        raise ConfigError(
            f"align.{setting} = {path} is one store, but align.mix has the splits "
            f"{list(config.align.mix)}. Name the folder of a run that has them all, or leave "
            f"align.mix out."
        )
    return path if is_trained else None
