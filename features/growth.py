"""Brings a store up to an index that has more than it: rows behind its own, or caption fields.

What changes is written beside the store as in a new one, and then moved into it, file by file: rows
first, then the metadata that make the arrays longer, and last the attributes of the store, which
say how many rows it has. Killed before that, the store has the rows it had, and the next run does
the same again. The chunk that was the last, and not full, loses its status before: it is done again
with its new rows, and zeros are never taken for features.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import zarr

from features.column import create_column
from features.errors import SourceError
from features.index import Index
from features.partial import partial_path, remove_leftovers
from features.storage.files import delete, is_file, write
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath
from features.store import (
    FeatureStore,
    create_row_array,
    keys_digest,
    row_array_names,
    write_rows,
)

logger = logging.getLogger(__name__)
METADATA = "zarr.json"


def follow_index(store: FeatureStore, index: Index, *, append: bool) -> FeatureStore:
    """Return the store with all rows and caption fields of an index, whose first rows it has.

    Args:
        store: Its features stay as they are; further rows and fields are pending.
        index: The index of the same split.
        append: Whether rows may be added that were not appended to the index.

    Raises:
        SourceError: The store does not have the first rows of the index, or rows are to be added
            without having been asked for.
    """
    _check_first_rows(store, index, append=append)
    if isinstance(store.path, Path):
        remove_leftovers(store.path)
    added = [name for name in row_array_names(index) if not is_file(store.path / name / METADATA)]
    if not added and index.rows == store.rows and index.source == store.source:
        return store
    with _folder_beside(store.path) as folder:
        _write(folder, store, index, added)
        _move(folder, store, grows=index.rows > store.rows)
    logger.info("%s: %d rows, %d of them new", store.path, index.rows, index.rows - store.rows)
    return FeatureStore.open(store.path)


def _check_first_rows(store: FeatureStore, index: Index, *, append: bool) -> None:
    has_them = store.rows <= index.rows
    if not has_them or store.keys_sha256 != keys_digest(index, store.rows):
        raise SourceError(
            f"The store {store.path} has {store.rows} rows with keys {store.keys_sha256[:12]}…, "
            f"the index {index.path} has {index.rows} others. The same rows were expected. Give "
            f"this run another `run.dir`, or delete {store.path} to extract again."
        )
    if store.rows < index.rows and not (append or store.rows in index.grown_from):
        raise SourceError(
            f"The store {store.path} has {store.rows} rows, the index {index.path} has "
            f"{index.rows - store.rows} more. The same rows were expected. If they are wanted, run "
            f"`sail extract` with --append; if not, narrow `path` or `rows` of the source, and "
            f"delete the index."
        )


def _write(folder: Path, store: FeatureStore, index: Index, added: list[str]) -> None:
    """Write beside the store what it will have, except chunks that it has already."""
    attributes = store.attributes | {
        "rows": index.rows,
        "keys_sha256": keys_digest(index),
        "source": index.source,
    }
    group = zarr.create_group(folder, attributes=attributes)
    grows = index.rows > store.rows
    there = [name for name in row_array_names(index) if name not in added]
    for name in [*added, *(there if grows else [])]:
        create_row_array(group, name, index, store.rows_per_chunk)
    if added:
        write_rows(group, added, index, store.rows_per_chunk)
    if grows:
        write_rows(group, there, index, store.rows_per_chunk, store.full_chunks)
        for name in store.columns():
            column, longer = store.column(name), group.create_group(name)
            size = store.rows_per_chunk
            create_column(longer, index.rows, column.dim, size, dtype=column.dtype.name)


def _move(folder: Path, store: FeatureStore, *, grows: bool) -> None:
    """Move the files written beside a store into it, in the order that is safe."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    chunks = [name for name in names if name.name != METADATA]
    metadata = [name for name in names if name.name == METADATA and name.parent.name]

    def move(name: PurePath) -> None:
        _publish(folder / name, store.path / name.as_posix())

    for _ in in_order(move, chunks, remote=isinstance(store.path, RemotePath)):
        pass
    for name in metadata:
        if not (_is_group(folder / name) and is_file(store.path / name.as_posix())):
            move(name)  # a group that is there stays: that of an encoder has its fingerprint
    if grows and store.full_chunks < store.num_chunks:
        for column in map(store.column, store.columns()):
            delete(column.status_file(store.full_chunks))
    move(PurePath(METADATA))


@contextmanager
def _folder_beside(store: Place) -> Iterator[Path]:
    """Yield a new local folder, on the same disk as a local store; it is removed at the end."""
    if isinstance(store, RemotePath):
        with tempfile.TemporaryDirectory(prefix="sail-") as folder:
            yield Path(folder)
        return
    partial = partial_path(store / "growth")
    try:
        partial.mkdir()
        yield partial
    finally:  # also after a full disk, above all: what is half-written would keep it full
        shutil.rmtree(partial, ignore_errors=True)


def _publish(file: Path, place: Place) -> None:
    """Give a file its place, as a whole."""
    if isinstance(place, RemotePath):
        write(place, file.read_bytes())
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    file.replace(place)


def _is_group(file: Path) -> bool:
    return bool(json.loads(file.read_text(encoding="utf-8"))["node_type"] == "group")
