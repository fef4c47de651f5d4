"""Stage one: what of it runs when; it does only what is missing."""

import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from features.errors import ConfigError
from features.index import Index, build_index, find_changes, update_index
from features.sources import Source
from features.storage.place import Place
from features.store import FeatureStore, extend_store
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.run.config import RunConfig
from pipeline.run.finished import KnownEncoders, is_finished
from pipeline.run.folder import RunFolder, start_run
from pipeline.run.usable import check_usable

if TYPE_CHECKING:
    from pipeline.run.cluster import Cluster

logger = logging.getLogger(__name__)
WORDNET_ID = re.compile(r"n\d{8}")


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
        Stopped: A signal came; what is done is on disk and the next call goes on from there.
    """
    if config.run.features is not None:
        raise ConfigError(
            f"run.features = {config.run.features} says that the features of another run are used. "
            f"Call `sail align`, or leave run.features out."
        )
    with _cluster(config, scheduler, workers) as cluster:
        folder = start_run(config)
        splits = []
        for split, source in config.data.items():
            index = current_index(
                folder, split, source, stop, append=append, needs_images=bool(config.encoders.image)
            )
            splits.append((_open_store(config, folder, split, index, append=append), index))
        stores = [store for store, _ in splits]
        known = KnownEncoders(folder.path / "encoders.json")
        names = [f"image/{name}" for name in config.encoders.image]
        names += [f"text/{name}" for name in config.encoders.text]
        for name in names:
            if is_finished(config, known, stores, name):
                continue
            stop.check()
            if cluster is not None:
                cluster.fill_encoder(stores, name, stop)
                continue
            # torch: a finished run does without
            from pipeline.run.filling import fill_encoder

            fill_encoder(config, known, splits, name, stop)
    check_usable(stores)
    return [store.path for store in stores]


def _cluster(
    config: RunConfig, scheduler: str | None, workers: int | None
) -> AbstractContextManager["Cluster | None"]:
    if scheduler is None and workers is None:
        return nullcontext()
    from pipeline.run.cluster import open_cluster

    return open_cluster(config, scheduler=scheduler, workers=workers)


def current_index(
    folder: RunFolder,
    split: str,
    source: Source,
    stop: StopRequest,
    *,
    append: bool,
    needs_images: bool = False,
) -> Index:
    """Open the index of a split, bring it up to date, or build it from its source.

    A source of which not one image is there is refused where images are needed.

    Raises:
        SourceError: The source changed since the index was built, otherwise than it may.
        Stopped: A signal came; the index is as it was before.
    """
    path, made = folder.index(split), folder.path / "shards" / split
    if path.is_file():
        index = Index.open(path)
        reader = source.open(index.names, folder=made)
        is_same = index.source == reader.source.recorded()
        if is_same or FeatureStore.is_at(folder.store(split)):
            changes = find_changes(index, reader)
            if not changes:
                return index
            with ProgressLine(f"index {split}", None, "samples") as line:
                advance = _until(stop, line)
                return update_index(index, reader, changes, append=append, on_progress=advance)
    reader = source.open(folder=made)
    with ProgressLine(f"index {split}", None, "samples") as line:
        advance = _until(stop, line)
        index = build_index(reader, path, needs_images=needs_images, on_progress=advance)
    _tell(index, split)
    return index


def _tell(index: Index, split: str) -> None:
    """Say what was handled by rule, and above all what nobody wants."""
    for place, about in index.unreadable.items():
        logger.warning("index %s: %s is left out: %s", split, place.name, about["why"])
    if index.unreadable:
        files = len(index.unreadable) + len(index.shards)
        logger.warning(
            "index %s: %d of %d files cannot be read and are left out; when they are mended, "
            "`sail extract` with --append adds their rows",
            split,
            len(index.unreadable),
            files,
        )
    for what, count in index.counts.items():
        if count:
            logger.info("index %s: %s: %d", split, what, count)
    if not index.fields and not index.has_labels:
        logger.warning("index %s: no captions; name those of the source in its `captions`", split)
    names = index.class_names or ()
    if names and all(map(WORDNET_ID.fullmatch, names)):
        logger.warning(
            "index %s: the classes are called %s, as WordNet numbers them; prompts need words: set "
            "class_names = 'imagenet-1k', or a file of names, in the source",
            split,
            names[0],
        )


def _until(stop: StopRequest, line: ProgressLine) -> Callable[[int], None]:
    """Return what moves the line on, until a signal asks to stop."""

    def advance(count: int) -> None:
        line.advance(count)
        stop.check()

    return advance


def _open_store(
    config: RunConfig, folder: RunFolder, split: str, index: Index, *, append: bool
) -> FeatureStore:
    path = folder.store(split)
    if not FeatureStore.is_at(path):
        return FeatureStore.create(path, index, rows_per_chunk=config.extract.rows_per_chunk)
    return extend_store(FeatureStore.open(path), index, append=append)
