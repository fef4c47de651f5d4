"""Which stores are trained on and measured: the run's own, or those that settings name instead."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align.columns import JoinedStore
from features.errors import ConfigError, StoreNotFoundError, TrainingError
from features.storage.files import is_file, remove_leftovers, write
from features.storage.lock import locked
from features.storage.place import Place, local_path
from features.store import FeatureStore
from pipeline.run.config import (
    SETTINGS_FILE,
    RunConfig,
    dump_config,
    dump_kept,
    folder_of_run,
    is_run,
    shipped_recipes,
)


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
    def moments(self) -> Path:
        """Moments of the features of each trained store."""
        return self.path / "moments"

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


def start_run(config: RunConfig, stage: Literal["features", "align"]) -> None:
    """Write the resolved settings into the run folder, and beside what a stage makes there.

    Commands that may refuse the settings call this once they have not.
    """
    path = config.run.dir / SETTINGS_FILE
    if not os.access(config.run.dir, os.W_OK) and _is(path, dump_config(config)):
        return  # a finished run of an earlier version, which is kept safe
    keep_settings(config, stage)
    _write_if_new(path, dump_config(config))


def keep_settings(config: RunConfig, stage: Literal["features", "align", "eval"]) -> None:
    """Write the resolved settings beside what a stage makes in the run folder."""
    path = config.run.dir / stage / SETTINGS_FILE
    _write_if_new(path, dump_kept(config))


def _write_if_new(path: Path, text: str) -> None:
    if not _is(path, text):  # a finished run may be read-only
        write(path, text.encode())


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


@contextmanager
def stage_lock(config: RunConfig, stage: str) -> Iterator[None]:
    """Keep other processes from writing what a stage makes in the run folder.

    What a process left there that was killed goes, and so do empty folders of one that is refused.

    Args:
        config: Of the run.
        stage: Name of the folder in it.

    Raises:
        LockedError: Another process writes it.
    """
    folder = config.run.dir / stage
    with locked(config.run.dir / f".{stage}.lock", f"{folder} is being written"):
        remove_leftovers(folder)
        try:
            yield
        except BaseException:
            for path in [*sorted(folder.rglob("*/"), reverse=True), folder]:
                with suppress(OSError):  # there is something in it
                    path.rmdir()
            raise


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


def store_of_run(name: str) -> Path:
    """Return a store that is given by its path, or as the only one of a run.

    Args:
        name: A store; or the folder of a run, its run file, or its recipe's name.

    Raises:
        ConfigError: The run has several.
    """
    path = local_path(name)
    is_named = name in shipped_recipes() or (path.suffix == ".toml" and path.is_file())
    if not (is_named or is_run(path)):
        return path
    folder = folder_of_run(name)
    stores = sorted((folder / "features").glob("*.zarr"))
    if len(stores) != 1:
        there = f"the stores {', '.join(map(str, stores))}" if stores else "no store"
        raise ConfigError(
            f"{name} is a run with {there}. The path of one store was expected. "
            f"{'Give one of them.' if stores else 'Create it with `sail extract`.'}"
        )
    return stores[0]


def check_extracted(config: RunConfig) -> None:
    """Refuse a run without features: what is to be done first, where there is no head either.

    Raises:
        StoreNotFoundError: A split that the head is trained on has no store.
    """
    places = [run_folder(config).store(split) for split in config.trained_splits]
    for place in places if config.align.store is None else ():
        if not FeatureStore.is_at(place):
            raise StoreNotFoundError(place)


def check_complete(store: FeatureStore, config: RunConfig, image: str, text: str) -> None:
    """Refuse columns of which not every chunk is done.

    Raises:
        StoreError: There is no such column.
        TrainingError: There are pending chunks.
    """
    used = [field for field in store.fields if field in (config.align.fields or store.fields)]
    names = [f"image/{image}", *(f"text/{text}/{field}" for field in used)]
    for column in (part for name in names for part in store.column(name).parts):
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


def filling(run: Path, *, shared: bool = True) -> AbstractContextManager[None]:
    """Hold what fills the columns of a run: any number of commands and workers share it.

    Args:
        run: Its folder.
        shared: Not where rows are added, which nobody may be filling meanwhile.
    """
    what = f"{run / 'features'} is being {'extended' if shared else 'filled'}"
    return locked(run / ".features.lock", what, shared=shared)
