"""The rows of a run: indexes and stores brought up to date, after all that may be refused.

`plan_rows` reads, compares and refuses; what it makes lies beside the indexes and goes again.
`PlannedRows.write` then puts it in place.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from features.index import (
    Changes,
    Index,
    build_index,
    find_changes,
    update_index,
)
from features.sources import Source
from features.sources.index_writer import Reader
from features.sources.scenes import ScenesSource
from features.storage.files import move, partial_path, without_empty_folders
from features.storage.place import Place
from features.storage.synchronise import make_folder
from features.store import FeatureStore, check_first_rows, extend_store
from pipeline.interrupt import Stopped, StopRequest
from pipeline.progress import ProgressLine
from pipeline.run.config import RunConfig
from pipeline.run.folder import RunFolder

logger = logging.getLogger(__name__)
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass
class PlannedRows:
    """What the index and the store of a split will be."""

    split: str
    index: Index
    path: Path
    """Of the index, in the end."""
    candidate: Path | None
    """Where the index is until then; None where it is in place."""
    store_path: Place
    store: FeatureStore | None = None
    """As it is; None where there is none yet."""

    @property
    def changes_rows(self) -> bool:
        """Whether the store gets further rows or fields, which nobody may be filling meanwhile."""
        index, store = self.index, self.store
        if store is None:
            return False
        is_same = index.rows == store.rows and index.source == store.source
        return not (is_same and set(index.row_arrays) <= set(store.row_arrays))

    def write(self, config: RunConfig) -> FeatureStore:
        """Put the index in place, and make or extend the store."""
        self.write_index()
        if self.store is not None:
            return extend_store(self.store, self.index, append=True, is_checked=True)
        size = config.extract.rows_per_chunk
        return FeatureStore.create(self.store_path, self.index, rows_per_chunk=size)

    def write_index(self) -> None:
        """Put the index in place."""
        if self.candidate is not None:
            move(self.candidate, self.path)
            self.candidate = None


@contextmanager
def plan_rows(
    config: RunConfig,
    folder: RunFolder,
    stop: StopRequest,
    *,
    append: bool,
    check_stores: Callable[[Sequence[FeatureStore]], None],
) -> Iterator[list[PlannedRows]]:
    """Find out what rows there are, and refuse those that do not follow on what is there.

    Args:
        config: The recipe.
        folder: Of the run.
        stop: Asked now and then.
        append: Whether rows that came to a source since it was indexed are added at its end.
        check_stores: Is given the stores there are, and may refuse them, before any file is read.

    Raises:
        SourceError: A source cannot be read, changed otherwise than by captions, or has more rows
            without `append`.
        StoreError: What is at the place of a store is none.
        Stopped: A signal came; indexes are as they were, but those that were made anew are kept.
    """
    # Drawing scenes writes files, so it comes after what may be refused.
    splits = sorted(config.extracted.items(), key=lambda each: isinstance(each[1], ScenesSource))
    opened = {
        split: _open(folder, split, source)
        for split, source in splits
        if not isinstance(source, ScenesSource)
    }
    there = [split for split in config.extracted if FeatureStore.is_at(folder.store(split))]
    stores = {split: FeatureStore.open(folder.store(split)) for split in there}
    check_stores(list(stores.values()))
    with _candidates(folder.index("any").parent) as plans:
        for split, source in splits:
            rows = opened.get(split) or _open(folder, split, source)
            needs_images = bool(config.encoders.image)
            plan = _plan(folder, split, rows, stop, append=append, needs_images=needs_images)
            plans.append(plan)
            if (store := stores.get(split)) is not None:
                check_first_rows(store, plan.index, append=append)
                plan.store = store
        order = list(config.extracted)
        yield sorted(plans, key=lambda plan: order.index(plan.split))


def current_index(folder: RunFolder, split: str, source: Source, stop: StopRequest) -> Index:
    """Open the index of a split, or make it anew where there is none; the rows stay the same.

    Raises:
        SourceError: The source changed since the index was built, otherwise than it may.
        Stopped: A signal came; the index is as it was before.
    """
    with _candidates(folder.index(split).parent) as plans:
        opened = _open(folder, split, source)
        plan = _plan(folder, split, opened, stop, append=False, needs_images=False)
        plans.append(plan)
        plan.write_index()
        return plan.index


@contextmanager
def _candidates(parent: Path) -> Iterator[list[PlannedRows]]:
    """Yield a list; in the end the indexes in it go that are not in place in their folder."""
    plans: list[PlannedRows] = []
    with without_empty_folders(parent / "any"):
        make_folder(parent)
        try:
            yield plans
        except Stopped:
            for plan in plans:
                if plan.store is None:
                    plan.write_index()
            raise
        finally:
            for plan in plans:
                if plan.candidate is not None:
                    plan.candidate.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Opened:
    reader: Reader
    index: Index | None
    """The index that there is, if it is of this source."""
    changes: Changes | None
    """In what the source differs from it."""


def _open(folder: RunFolder, split: str, source: Source) -> _Opened:
    """Find the files of a source, and compare them with the index."""
    path, made = folder.index(split), folder.path / "shards" / split
    if path.is_file():
        index = Index.open(path)
        reader = source.open(index.names, folder=made)
        is_same = index.source == reader.source.recorded()
        if is_same or FeatureStore.is_at(folder.store(split)):
            return _Opened(reader, index, find_changes(index, reader))
    return _Opened(source.open(folder=made), None, None)


def _plan(
    folder: RunFolder,
    split: str,
    opened: _Opened,
    stop: StopRequest,
    *,
    append: bool,
    needs_images: bool,
) -> PlannedRows:
    path, reader, index = folder.index(split), opened.reader, opened.index
    candidate = None
    if index is None or opened.changes:
        candidate = partial_path(path)
        with ProgressLine(f"index {split}", None, "samples") as line:
            advance = _until(stop, line)
            if index is None or opened.changes is None:
                index = build_index(
                    reader, candidate, needs_images=needs_images, on_progress=advance
                )
                _tell(index, split)
            else:
                index = update_index(
                    index,
                    reader,
                    opened.changes,
                    append=append,
                    into=candidate,
                    on_progress=advance,
                )
        index.path = path  # for messages; the file stays open when it gets that name
    return PlannedRows(split, index, path, candidate, folder.store(split))


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
        there = f", of {', '.join(index.seen)}" if index.seen else ""
        logger.warning(
            "index %s: no captions; name those of the source in its `captions`%s", split, there
        )
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
