"""Stage one: what of it runs when; it does only what is missing.

All that may be refused is refused before anything is written. One command at a time makes the rows
ready; then any number of them, and of workers, fill the columns, while nobody may add rows.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from features.errors import ConfigError, EncoderMissingError, SourceError
from features.storage.files import remove_leftovers
from features.storage.lock import locked
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import RunConfig
from pipeline.run.finished import KnownEncoders, check_columns, is_finished, is_whole
from pipeline.run.folder import RunFolder, filling, run_folder, start_run
from pipeline.run.rows import PlannedRows, plan_rows
from pipeline.run.usable import check_usable

if TYPE_CHECKING:
    from pipeline.run.cluster import Cluster
    from pipeline.run.filling import LoadedEncoders

logger = logging.getLogger(__name__)
Fingerprints = dict[str, dict[str, Any]]


def extract(
    config: RunConfig,
    stop: StopRequest,
    *,
    append: bool = False,
    scheduler: str | None = None,
    workers: int | None = None,
) -> list[Place]:
    """Run stage one for every split and encoder of the recipe; return the stores.

    Args:
        config: The recipe.
        stop: Asked between chunks.
        append: Whether rows that came to a source since it was indexed are added at its end.
        scheduler: Address or scheduler file of a Dask cluster whose workers encode.
        workers: Or: so many processes of this machine do. Without either this process does.

    Raises:
        SourceError: A source changed otherwise than by captions, has more rows without `append`,
            or an encoder cannot use one row of it.
        EncoderError: An encoder cannot be loaded.
        StoreMismatchError: A column was made by something else than the recipe says.
        LockedError: Rows are to be added while another command fills the columns.
        Stopped: A signal came; what is done is on disk and the next call goes on from there.
    """
    if config.run.features is not None:
        raise ConfigError(
            f"run.features = {config.run.features} says that the features of another run are used. "
            f"Call `sail align`, or leave run.features out."
        )
    folder = run_folder(config)
    imported = _imported(config, folder)
    if not config.extracted:
        start_run(config, "features")
        return imported
    names = [
        *(f"image/{name}" for name in config.encoders.image),
        *(f"text/{name}" for name in config.encoders.text),
    ]
    with _cluster(config, scheduler, workers) as cluster, ExitStack() as until_done:
        known = KnownEncoders(folder.path / "encoders.json")
        encoders = _Encoders(config, known, cluster, stop)
        with (
            _preparing(folder, stop),
            plan_rows(
                config,
                folder,
                stop,
                append=append,
                check_stores=lambda stores: encoders.check(names, stores),
            ) as plans,
        ):
            encoders.check_rows(plans)
            remove_leftovers(folder.path)
            changes_rows = any(plan.changes_rows for plan in plans)
            with filling(folder.path, shared=False) if changes_rows else nullcontext():
                start_run(config, "features")
                splits = [(plan.write(config), plan.index) for plan in plans]
                encoders.remember()
            stores = [store for store, _ in splits]
            left = [
                name
                for name in names
                if not (name in encoders.gone and is_whole(config, name))
                and not is_finished(config, known, stores, name)
            ]
            if left:
                until_done.enter_context(filling(folder.path))
        for name in left:
            stop.check()
            if cluster is not None:
                cluster.fill_encoder(stores, name, stop)
                continue
            # torch: a finished run does without
            from pipeline.run.filling import fill_encoder

            fill_encoder(config, encoders.loaded, splits, name, stop)
    check_usable(stores)
    return [*imported, *(store.path for store in stores)]


def _imported(config: RunConfig, folder: RunFolder) -> list[Place]:
    """Return the stores of the splits without a source.

    Raises:
        SourceError: One is not there.
    """
    if config.align.store is not None:
        return []
    places = [folder.store(split) for split in config.data if split not in config.extracted]
    for place in places:
        if not FeatureStore.is_at(place):
            raise SourceError(
                f"The split of {place} has no source (kind = 'imported'), and no store is there. "
                f"Features that were imported were expected. Use `sail import-store ... --out "
                f"{place}`."
            )
    return places


class _Encoders:
    """What the encoders of a recipe are, by what is known of them or by loading them."""

    def __init__(
        self,
        config: RunConfig,
        known: KnownEncoders,
        cluster: "Cluster | None",
        stop: StopRequest,
    ) -> None:
        self._config, self._known, self._cluster, self._stop = config, known, cluster, stop
        self._loaded: LoadedEncoders | None = None
        self._found: dict[str, Fingerprints] = {}
        self.gone: dict[str, EncoderMissingError] = {}
        """Encoders whose files are not there, while all their columns are whole."""

    @property
    def loaded(self) -> "LoadedEncoders":
        """Loads them in this process."""
        if self._loaded is None:
            from pipeline.run.filling import LoadedEncoders  # torch: a finished run does without

            self._loaded = LoadedEncoders(self._config)
        return self._loaded

    def check(self, names: Sequence[str], stores: Sequence[FeatureStore]) -> None:
        """Check that every encoder can be loaded, and that the columns there are are its own.

        The first comes last, since the one that was loaded last is there when columns are filled.

        Args:
            names: `image/<encoder>` or `text/<encoder>`.
            stores: Those there are.

        Raises:
            EncoderError: It cannot be loaded.
            StoreMismatchError: A column was made by something else; the field is named.
        """
        for name in reversed(names):
            try:
                fingerprints = self._fingerprints(name)
            except EncoderMissingError as error:
                if not is_whole(self._config, name):
                    raise
                self.gone[name] = error
                continue
            for store in stores:
                check_columns(store, fingerprints)

    def check_rows(self, plans: Sequence[PlannedRows]) -> None:
        """Refuse further rows for an encoder whose files are gone; say which are not compared.

        Raises:
            EncoderMissingError: There are further rows.
        """
        grow = any(plan.store is None or plan.index.rows > plan.store.rows for plan in plans)
        for name, error in self.gone.items():
            if grow:
                raise error
            words = "%s is not compared with its columns, which are whole: %s"
            logger.warning(words, name, error)

    def remember(self) -> None:
        """Write down what the encoders are that this process loaded."""
        if self._cluster is None and self._found:
            from pipeline.run.filling import folder_of  # torch: a finished run does without

            for name, fingerprints in reversed(self._found.items()):  # in the order of the recipe
                folder = folder_of(self._config, name)
                self._known.remember(name, self._config, folder, fingerprints)

    def _fingerprints(self, name: str) -> Fingerprints:
        found = self._known.fingerprints(name, self._config)
        if found is None:
            self._stop.check()
            if self._cluster is not None:
                found = self._cluster.fingerprints(name, self._stop)
            else:
                from features.encoders.trial import try_encoder  # torch

                encoder = self.loaded.get(name)
                if encoder.plan is not None:
                    logger.info("%s: %s", name, encoder.plan.summary())
                try_encoder(encoder)
                found = encoder.fingerprints
            self._found[name] = found
        return found


def _preparing(folder: RunFolder, stop: StopRequest) -> AbstractContextManager[None]:
    """Wait until no other command makes the rows ready, and keep others from it."""
    told: list[str] = []

    def wait(words: str) -> None:
        if not told:
            logger.info("%s", words)
            told.append(words)
        stop.check()

    what = f"{folder.path} is being made ready"
    return locked(folder.path / ".extract.lock", what, wait=wait)


def _cluster(
    config: RunConfig, scheduler: str | None, workers: int | None
) -> AbstractContextManager["Cluster | None"]:
    if scheduler is None and workers is None:
        return nullcontext()
    from pipeline.run.cluster import open_cluster

    return open_cluster(config, scheduler=scheduler, workers=workers)
