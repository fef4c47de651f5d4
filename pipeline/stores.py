"""Which stores are trained on and measured: the run's own, or those that settings name instead."""

from typing import Literal

from align.join import JoinedStore
from align.selection import PairedStore
from features.errors import ConfigError, TrainingError
from features.storage.files import is_file
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.config import RunConfig
from pipeline.run import RunFolder


def open_stores(config: RunConfig, folder: RunFolder, split: str, weight: float) -> PairedStore:
    """Open the store of a split, and that of its texts where they are elsewhere.

    Raises:
        ConfigError: One store is named for several splits.
        StoreError: There is no store.
    """
    image = FeatureStore.open(_named(config, "store", split) or folder.store(split))
    elsewhere = _named(config, "text_store", split)
    return PairedStore(image, FeatureStore.open(elsewhere) if elsewhere else image, weight)


def open_evaluated(config: RunConfig, folder: RunFolder, split: str) -> FeatureStore:
    """Open the store of a split, with its texts from elsewhere where the settings say so.

    A single store that is named holds the split that is trained on; the folder of a run may hold
    others too. A split that is not there is the run's own.

    Raises:
        ConfigError: One store is named for several splits.
        StoreError: There is no store.
        TrainingError: The texts are not those of the same rows.
    """
    stores = open_stores(config, folder, split, 1.0)
    is_one = stores.text is stores.image
    return stores.image if is_one else JoinedStore(stores.image, stores.text)


def check_complete(stores: PairedStore, config: RunConfig, image: str, text: str) -> None:
    """Refuse columns of which not every chunk is done.

    Raises:
        StoreError: There is no such column.
        TrainingError: There are pending chunks.
    """
    used = set(config.align.fields or stores.text.fields)
    columns = [stores.image.column(f"image/{image}")]
    columns += [
        stores.text.column(f"text/{text}/{field}") for field in stores.text.fields if field in used
    ]
    for column in columns:
        if pending := column.pending():
            raise TrainingError(
                f"{column.path} has {len(pending)} chunks that are not done. A complete column was "
                f"expected. Finish it with `sail extract`."
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
            f"{list(config.align.mix)}. The folder of a run that has them all was expected. "
            f"Name such a folder, or leave align.mix out."
        )
    return path if is_trained else None
