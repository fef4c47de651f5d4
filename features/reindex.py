"""Brings an index up to date with a source that has more: caption fields, shards, rows.

Rows are permanent: each keeps its number, key and place. So the index that follows is written
beside the one that is there, compared with it row by row, and takes its name at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from features.config import ClassFolderSource, FolderSource, Source
from features.errors import SourceError
from features.index import Index
from features.index_builder import ROWS_PER_GROUP, Earlier, build_index, settings_of
from features.partial import partial_path
from features.sources import open_source
from features.storage import files
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath

MAY_DIFFER = {"captions", "path", "rows"}
PLACES = {"path", "images", "names", "class_names"}
SHOWN = 80
START_AGAIN = "Give this run another `run.dir`, or delete the index and the store to start again."

ONLY_MOVED = (
    "If the same files lie elsewhere now, or only their times changed, delete the index alone: it "
    "is written again, and the features stay."
)


@dataclass(frozen=True)
class Changes:
    """In what a source is no longer as it was when it was indexed."""

    settings: frozenset[str]
    """Settings that differ: which captions are picked, where the files are, how many rows."""
    tables: tuple[Place, ...]
    """Tables of captions that were written anew."""
    files: tuple[Place, ...]
    """Shards, or folders of a class, that were not there."""

    def __bool__(self) -> bool:
        return bool(self.settings or self.tables or self.files)


def find_changes(index: Index, source: Source) -> Changes:
    """Compare a source with what was indexed, without reading its samples.

    Raises:
        SourceError: A file changed or is gone, or the settings are those of other rows.
    """
    return Changes(
        settings=_changed_settings(index, source),
        tables=_changed_tables(index, source),
        files=_added_files(index, source),
    )


def update_index(
    index: Index,
    source: Source,
    changes: Changes,
    *,
    append: bool,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Index:
    """Replace an index by the one that follows it; killed at any moment, one of both is there.

    Shards whose rows are there are only read again where other captions are wanted of them.

    Args:
        index: What was indexed earlier.
        source: Settings as they are now.
        changes: What `find_changes` found between these two.
        append: Whether there may be more rows: those of further shards, or at the end of a table.
        on_progress: Called now and then with the number of samples since the last call.

    Raises:
        SourceError: Rows would change or go, or there are more and `append` is not set.
    """
    if changes.files and not append:
        raise SourceError(
            f"Files match {settings_of(source)['path']} that were not there when it was indexed in "
            f"{index.path}: {len(changes.files)}, of which {changes.files[0]} is the first. "
            f"{_NOT_WITHOUT_APPEND}"
        )
    candidate = partial_path(index.path)
    earlier = Earlier(index.rows, index.names, index.grown_from)
    if not (changes.tables or changes.settings - {"path"} or source.rows):
        earlier = replace(earlier, samples=index.samples, counts=index.counts)
    try:
        build_index(source, candidate, on_progress, earlier)
        _check_rows(index, Index.open(candidate), append=append)
        candidate.replace(index.path)
    finally:
        candidate.unlink(missing_ok=True)
    return Index.open(index.path)


def _changed_settings(index: Index, source: Source) -> frozenset[str]:
    settings = settings_of(source)
    names = index.source.keys() | settings.keys()
    differing = {name for name in names if index.source.get(name) != settings.get(name)}
    is_one_place = isinstance(source, FolderSource | ClassFolderSource)
    if others := differing - (MAY_DIFFER - {"path"} if is_one_place else MAY_DIFFER):
        name = min(others)
        raise SourceError(
            f"{index.path} was made from another source: its {name} was "
            f"{index.source.get(name)!r} and is {settings.get(name)!r} now. The settings when it "
            f"was made were expected, but for further captions or files. {START_AGAIN}"
            + (f" {ONLY_MOVED}" if name in PLACES else "")
        )
    return frozenset(differing)


def _changed_tables(index: Index, source: Source) -> tuple[Place, ...]:
    """Return the tables that changed, which hold no images; refuse any other file that did."""
    if isinstance(source, ClassFolderSource):
        return ()  # the files are the images; they are checked when they are read
    changed = []
    remote = any(isinstance(path, RemotePath) for path in index.shards)
    versions = in_order(files.version_or_none, index.shards, remote=remote)
    for (path, shard), found in zip(index.shards.items(), versions, strict=True):
        if found is not None and shard == {"path": str(path), "name": shard["name"], **found}:
            continue
        if found is None or not isinstance(source, FolderSource):
            what = "has changed" if found else "is gone"
            raise SourceError(
                f"{path} {what} since it was indexed in {index.path}. The same file was "
                f"expected. Restore it, or delete the index and the store to start again. "
                f"{ONLY_MOVED}"
            )
        changed.append(path)
    return tuple(changed)


def _added_files(index: Index, source: Source) -> tuple[Place, ...]:
    found = open_source(source, index.names).files
    if left_out := [path for path in index.shards if path not in found]:
        raise SourceError(
            f"{left_out[0]} was indexed in {index.path}, but the source's path, "
            f"{settings_of(source)['path']}, does not match it any more. All files that have rows "
            f"were expected. {START_AGAIN} {ONLY_MOVED}"
        )
    return tuple(file for file in found if file not in index.shards)


def _check_rows(old: Index, new: Index, *, append: bool) -> None:
    """Refuse an index that does not begin with the rows of the one before it, as they were."""
    if left_out := [field for field in old.fields if field not in new.fields]:
        raise SourceError(
            f"{old.path} has captions under {left_out[0]!r}, which the source no longer gives. "
            f"Further ones beside {list(old.fields)} were expected. Add it to `captions` of the "
            f"source again."
        )
    if new.rows < old.rows:
        raise SourceError(
            f"The source has {new.rows} rows now, {old.path} has {old.rows}. At least as many were "
            f"expected. Restore it; or: {START_AGAIN}"
        )
    if old.class_names and (new.class_names or ())[: len(old.class_names)] != old.class_names:
        raise SourceError(
            f"The class names of the source do not begin with the {len(old.class_names)} in "
            f"{old.path}. Further ones behind these were expected. {START_AGAIN}"
        )
    names = _names_compared(old)
    for start in range(0, old.rows, ROWS_PER_GROUP):
        stop = min(start + ROWS_PER_GROUP, old.rows)
        was, now = old.rows_between(start, stop, names), new.rows_between(start, stop, names)
        if not was.equals(now):
            raise _changed_row(old, start, was.to_pylist(), now.to_pylist())
    if new.rows > old.rows and not append:
        raise SourceError(
            f"The source has {new.rows - old.rows} more rows than {old.path}. {_NOT_WITHOUT_APPEND}"
        )


def _names_compared(old: Index) -> tuple[str, ...]:
    """Return the columns in which rows must be equal: labels and groups may come later."""
    not_there = {"label": not old.has_labels, "group": not old.has_groups}
    names = [name for name in old.columns if not not_there.get(name)]
    return (*names, *(f"caption/{field}" for field in old.fields))


def _changed_row(
    old: Index, start: int, was: list[dict[str, Any]], now: list[dict[str, Any]]
) -> SourceError:
    row = next(i for i in range(len(was)) if was[i] != now[i])
    name = next(name for name in was[row] if was[row][name] != now[row][name])
    return SourceError(
        f"Row {start + row} of {old.path}, {was[row]['key']!r}, has {name} = "
        f"{was[row][name]!r:.{SHOWN}}, but the source gives {now[row][name]!r:.{SHOWN}} now. The "
        f"same rows in the same order were expected, since their features are computed. Restore "
        f"the source; or: {START_AGAIN}"
    )


_NOT_WITHOUT_APPEND = (
    "No more rows than there are were expected. If they are wanted, run `sail extract` with "
    "--append: they come behind the others, which stay as they are. If not, narrow `path` or "
    "`rows` of the source."
)
