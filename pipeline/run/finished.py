"""Tells a finished extraction without loading an encoder: neither torch nor weights are read.

`encoders.json` in the run folder holds for each encoder the fingerprints that its columns had when
it was loaded, and everything that these follow from: settings, sizes and times of its files,
versions of the libraries. While these are the same, so are the fingerprints.
"""

import logging
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from features.config import OWN
from features.errors import FileError, SourceError, StoreCorruptError, StoreMismatchError
from features.status import Status
from features.storage.column import encoder_of
from features.storage.files import write_json
from features.storage.reading import Expected, read_json
from features.store import FeatureStore
from pipeline.run.config import RunConfig
from pipeline.run.folder import run_folder

logger = logging.getLogger(__name__)
EXPECTED = Expected("What is known of the encoders", "They are loaded, and it is written again.")
LIBRARIES = (
    *("sail", "torch", "transformers", "tokenizers", "pillow", "simplejpeg"),
    *("timm", "torchvision", "open_clip_torch", "model2vec"),
)


class KnownEncoders:
    """What the encoders of a run were when they were loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path.exists():
            try:
                self._entries = read_json(path, dict[str, Any], EXPECTED)
            except FileError as error:  # the encoders are loaded
                logger.warning("%s", error)

    def fingerprints(self, name: str, config: RunConfig) -> dict[str, dict[str, Any]] | None:
        """Return those of `image/<name>` or `text/<name>`, None if it must be loaded."""
        entry = self._entries.get(name)
        if not isinstance(entry, dict):
            return None
        if entry.get("follows_from") != _causes(name, config, entry.get("folder")):
            return None
        fingerprints: dict[str, dict[str, Any]] | None = entry.get("fingerprints")
        return fingerprints

    def remember(
        self,
        name: str,
        config: RunConfig,
        folder: Path | None,
        fingerprints: dict[str, dict[str, Any]],
    ) -> None:
        """Write down what a loaded encoder is, and the folder of its files, if it has any.

        Not of a function of the user's own, of which only importing it tells.
        """
        kind, encoder = name.split("/")
        if getattr(config.encoders, kind)[encoder].model.startswith(OWN):
            return
        place = None if folder is None else str(folder.absolute())
        self._entries[name] = {
            "folder": place,
            "follows_from": _causes(name, config, place),
            "fingerprints": fingerprints,
        }
        write_json(self._path, self._entries)


def is_whole(config: RunConfig, name: str) -> bool:
    """Return whether every split has a store in which all columns of an encoder are done."""
    stores = _stores(config)
    columns = [
        (store, column)
        for store in stores
        for names in columns_of(config, store, name)
        for column in names
    ]
    return len(stores) == len(config.extracted) and all(
        column in store.columns() and not store.column(column).pending()
        for store, column in columns
    )


def _stores(config: RunConfig) -> list[FeatureStore]:
    folder = run_folder(config)
    paths = [folder.store(split) for split in config.extracted]
    return [FeatureStore.open(path) for path in paths if FeatureStore.is_at(path)]


def is_finished(
    config: RunConfig, known: KnownEncoders, stores: Iterable[FeatureStore], name: str
) -> bool:
    """Return whether nothing of an encoder is left to do; false where only loading it can tell.

    Args:
        config: Settings of the run.
        known: What the encoders were.
        stores: The store of every split.
        name: `image/<encoder>` or `text/<encoder>`.

    Raises:
        StoreMismatchError: A column was made by something else.
        SourceError: More rows are quarantined than the recipe allows.
    """
    fingerprints = known.fingerprints(name, config)
    if fingerprints is None:
        return False
    columns = []
    for store in stores:
        for group, fingerprint in fingerprints.items():
            store.add_encoder(group, fingerprint, dim=fingerprint["dim"])
        for names in columns_of(config, store, name):
            columns += [(store, column) for column in names]
    if any(store.column(column).pending() for store, column in columns):
        return False
    for store, column in columns:
        check_quarantined(store, column, config.extract.max_bad_fraction)
    return True


def columns_of(config: RunConfig, store: FeatureStore, name: str) -> list[list[str]]:
    """Return the columns of an encoder, grouped by what one pass over the rows fills.

    That is all columns of an encoder; of a text encoder those of each caption field by themselves.

    Args:
        config: Has the image columns.
        store: Has the caption fields.
        name: `image/<encoder>` or `text/<encoder>`.
    """
    kind, encoder = name.split("/")
    if kind == "image":
        return [[name, *(f"image/{column}" for column in config.encoders.image[encoder].also)]]
    columns = [encoder, *config.encoders.text[encoder].also]
    return [[f"text/{column}/{field}" for column in columns] for field in store.fields]


def check_columns(store: FeatureStore, fingerprints: dict[str, dict[str, Any]]) -> None:
    """Check that the columns of an encoder, as far as a store has them, are of the one expected.

    Args:
        store: Is not changed.
        fingerprints: By the name of the encoder in the store, as `image/<encoder>`.

    Raises:
        StoreMismatchError: A column was made by something else; the field is named.
    """
    for name in store.columns():
        if (expected := fingerprints.get(encoder_of(name))) is None:
            continue
        for field, found, wanted in store.column(name).fingerprint.differences(expected):
            place = f"{store.path}/{encoder_of(name)}"
            raise StoreMismatchError(place, field, found=found, expected=wanted)


def check_quarantined(store: FeatureStore, name: str, max_bad_fraction: float) -> None:
    """Refuse a complete column of which too many rows are not ok.

    Raises:
        SourceError: With the number of rows.
        StoreCorruptError: A chunk is done but for some rows, which nothing would ever fill.
    """
    column = store.column(name)
    status = column.status()
    if len(pending := np.flatnonzero(status == Status.PENDING)):
        chunk = int(pending[0]) // column.rows_per_chunk
        raise StoreCorruptError(
            column.status_file(chunk),
            f"{len(pending)} rows are not done, from row {pending[0]} on, as where a command that "
            f"began before rows were appended wrote the chunk after that",
        )
    bad = int(np.count_nonzero(status != Status.OK))
    if bad > max_bad_fraction * store.rows:
        raise SourceError(
            f"{bad} of {store.rows} rows of {store.path}/{name} are quarantined, more than "
            f"extract.max_bad_fraction = {max_bad_fraction}. See why with `sail inspect "
            f"{store.path}`."
        )


def _causes(name: str, config: RunConfig, folder: str | None) -> dict[str, Any]:
    """Return, as JSON holds it, all that the fingerprint of an encoder follows from."""
    kind, encoder = name.split("/")
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file()) if folder else []
    status = [(str(path), path.stat()) for path in files]
    return {
        "settings": getattr(config.encoders, kind)[encoder].model_dump(mode="json"),
        "device": config.run.device,
        "files": [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path, s in status],
        "versions": {library: _version(library) for library in LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
