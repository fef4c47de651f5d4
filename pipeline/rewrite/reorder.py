"""`sail reorder`: the rows of a store by the keys of another one, so that the two can be joined."""

from dataclasses import replace

from features.errors import SourceError
from features.keys import rows_by_key, store_key_hashes
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.formats.store import StoreRows, write_store
from pipeline.formats.unfinished import check_free
from pipeline.interrupt import StopRequest
from pipeline.rewrite.chosen import ChosenRows
from pipeline.rewrite.merge import origin_of


def reorder_store(
    path: Place, out: Place, like: Place, stop: StopRequest, *, memory_mb: int
) -> Place:
    """Write the rows of a store that another one has too, by their keys, in its order.

    It goes on where it was stopped. As many rows are made at once as fit in half of the memory, of
    every chunk that has some of them: a store whose shards stand in another order is read about
    once, one whose rows stand in any order once for each time that the memory is filled.

    Args:
        path: The store; every chunk of its columns must be done.
        out: Where the new one goes; there must be none. Its chunks are as large as those of `like`.
        like: The other store, whose columns need not be done.
        stop: Asked before every read.
        memory_mb: How many MiB of features are held.

    Raises:
        SourceError: A key of `like` is not in the store.
        StoreError: The store is not whole, or there is something at `out`.
        Stopped: A signal came.
    """
    check_free(out)
    rows = StoreRows(FeatureStore.open(path), restored=False)
    other = FeatureStore.open(like)
    numbers, is_there = rows_by_key(store_key_hashes(rows.store), store_key_hashes(other))
    if not is_there.all():
        row = int(is_there.argmin())
        raise SourceError(
            f"{path} has no row with the key {str(other.keys(row, row + 1)[0])!r} of row {row} of "
            f"{like}, and lacks {int((~is_there).sum()) - 1} more. All of its keys were expected. "
            f"Take out the others with `sail subset {like} --keys`, or extract both from the same "
            f"sources."
        )
    source = {
        "kind": "reorder",
        "path": str(path),
        "like": str(like),
        "of": origin_of(rows.store),
    }
    size = other.rows_per_chunk
    layout = replace(
        rows.layout,
        rows=other.rows,
        rows_per_chunk=size,
        source=source,
        keys_sha256=other.keys_sha256,
    )
    row_bytes = sum(rows.store.column(name).row_bytes for name in layout.columns)
    return write_store(
        out,
        ChosenRows(rows, numbers, layout, stop),
        stop,
        origin=path,
        rows_at_once=(memory_mb << 20) // (2 * row_bytes),  # those before are held until then
    )
