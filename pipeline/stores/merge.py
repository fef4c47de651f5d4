"""Stores made of the rows of stores: `sail merge`, `sail rechunk`, `sail reorder`."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int32, Int64

from features.errors import SourceError, StoreError
from features.sources.base import distinct_stems
from features.storage.fingerprint import Fingerprint
from features.storage.place import Place
from features.storage.rows import NUMBERS
from features.store import FeatureStore, rows_by_key, store_key_hashes
from pipeline.interrupt import StopRequest
from pipeline.stores.blocks import STRINGS, Block, Layout, joined, num_rows, selected
from pipeline.stores.resumable import check_free
from pipeline.stores.writer import StoreRows, write_store


def rechunk_store(path: Place, out: Place, rows_per_chunk: int, stop: StopRequest) -> Place:
    """Write a store with chunks of another size; it goes on where it was stopped.

    Args:
        path: The store; every chunk of its columns must be done.
        out: Where the new one goes; there must be none.
        rows_per_chunk: Of the new one.
        stop: Asked before every read.

    Raises:
        StoreError: The store is not whole, or there is something at `out`.
        Stopped: A signal came.
    """
    check_free(out)
    rows = StoreRows(FeatureStore.open(path), restored=False)
    return write_store(out, rows, stop, origin=path, rows_per_chunk=rows_per_chunk)


def merge_stores(
    paths: Sequence[Place], out: Place, stop: StopRequest, *, prefix: bool = False
) -> Place:
    """Write the rows of stores behind each other in one; it goes on where it was stopped.

    Numbers of compositional examples go on from store to store; where a store has no labels or
    groups and others have, they are -1.

    Args:
        paths: The stores, of the same encoders and caption fields.
        out: Where the new one goes; there must be none. Its chunks are as large as the first's.
        stop: Asked before every read.
        prefix: Whether keys get the name of their store put before, with as many of its folders as
            make all names distinct.

    Raises:
        SourceError: A key comes twice.
        StoreError: Two stores differ in an encoder, in captions or in class names, one is not
            whole, or there is something at `out`.
        Stopped: A signal came.
    """
    check_free(out)
    stores = [FeatureStore.open(path) for path in paths]
    are_scaled = {store.column(name).is_scaled for store in stores for name in store.columns()}
    every = [StoreRows(store, restored=len(are_scaled) > 1) for store in stores]
    for rows in every[1:]:
        _check_alike(every[0], rows)
    if not prefix:
        _check_keys_differ(stores)
    return write_store(
        out, _Merged(every, prefix=prefix), stop, origin=" and ".join(map(str, paths))
    )


def origin_of(store: FeatureStore) -> dict[str, object]:
    """Return what a store that is made of another says of it."""
    return {
        "path": str(store.path),
        "rows": store.rows,
        "keys_sha256": store.keys_sha256,
        "source": store.source,
    }


class _Merged:
    def __init__(self, every: Sequence[StoreRows], *, prefix: bool) -> None:
        self._every, self._prefix = every, prefix
        stores = [rows.store for rows in every]
        self._names = distinct_stems([store.path for store in stores], set())
        self._firsts = _sums([store.rows for store in stores])
        self._groups = _sums([_highest(store.groups()) + 1 for store in stores])
        first = every[0].layout
        self.layout = Layout(
            rows=sum(store.rows for store in stores),
            names=(
                *(name for name in first.names if name not in NUMBERS),
                *(name for name in NUMBERS if any(name in rows.layout.names for rows in every)),
            ),
            columns=first.columns,
            fingerprints=first.fingerprints,
            source={
                "kind": "merge",
                "path": [str(store.path) for store in stores],
                "stores": [origin_of(store) for store in stores],
            },
            rows_per_chunk=first.rows_per_chunk,
            class_names=next((each.layout.class_names for each in every if _labelled(each)), None),
            scaled=first.scaled,
        )

    @property
    def stamp(self) -> str:
        names = self._names.values() if self._prefix else ["False"]
        return " ".join([*names, *(rows.stamp for rows in self._every)])

    def block(self, start: int, stop: int) -> Block:
        parts = []
        for rows, first, groups in zip(self._every, self._firsts, self._groups, strict=True):
            low, high = max(start - first, 0), min(stop - first, rows.layout.rows)
            if low < high:
                parts.append(self._adapted(rows, rows.block(low, high), groups))
        return joined(parts)

    def _adapted(self, rows: StoreRows, block: Block, groups: int) -> Block:
        """Fill in what other stores have, and make the numbers and keys unique."""
        for name in NUMBERS:
            if name in self.layout.names and name not in block:
                block[name] = np.full(num_rows(block), -1, dtype=np.int32)
        if "group" in block:
            block["group"] = np.where(block["group"] < 0, -1, block["group"] + groups)
        if self._prefix:
            keys = [f"{self._names[rows.store.path]}/{key}" for key in block["key"].tolist()]
            block["key"] = np.array(keys, dtype=STRINGS)
        return block


def _sums(numbers: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(numbers[:-1])]


def _highest(groups: Int32[np.ndarray, "rows"] | None) -> int:
    return -1 if groups is None else int(groups.max())


def _check_alike(first: StoreRows, other: StoreRows) -> None:
    """Refuse a store that has other columns or texts than the first."""
    place = str(other.store.path)
    ours, theirs = first.layout, other.layout
    pairs: list[tuple[str, object, object]] = [
        ("caption fields", first.store.fields, other.store.fields),
        ("columns", dict(ours.columns), dict(theirs.columns)),
    ]
    if _labelled(first) and _labelled(other):
        pairs.append(("class_names", ours.class_names, theirs.class_names))
    for encoder in ours.fingerprints.keys() & theirs.fingerprints.keys():
        before = Fingerprint(ours.fingerprints[encoder])
        pairs += [
            (f"{encoder}: {field}", value, other)
            for field, value, other in before.differences(theirs.fingerprints[encoder])
        ]
    for what, expected, found in pairs:
        if expected != found:
            raise StoreError(
                f"{place} has {what} = {found!r}, {first.store.path} has {expected!r}. Stores of "
                f"the same encoders, captions and classes were expected. Leave one out, or extract "
                f"it by the recipe of the other."
            )


def _check_keys_differ(stores: Sequence[FeatureStore]) -> None:
    """Refuse stores that have a key in common, before any row is written."""
    hashes = np.concatenate([store_key_hashes(store) for store in stores])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if not len(same):
        return
    firsts = np.array(_sums([store.rows for store in stores]))
    again = int(order[same + 1].min())
    number = int(np.searchsorted(firsts, again, "right")) - 1
    row = again - int(firsts[number])
    raise SourceError(
        f"{len(same)} keys come twice in the stores, such as "
        f"{str(stores[number].keys(row, row + 1)[0])!r} in row {row} of {stores[number].path}. "
        f"Unique keys were expected. Give --prefix, or leave a store out."
    )


def _labelled(rows: StoreRows) -> bool:
    return "label" in rows.layout.names


class ChosenRows:
    """Rows of a store by their numbers; of every chunk that has some of a block, one read."""

    def __init__(
        self,
        rows: StoreRows,
        numbers: Int64[np.ndarray, "chosen"],
        layout: Layout,
        stop: StopRequest,
    ) -> None:
        self.layout = layout
        self._rows, self._numbers, self._stop = rows, numbers, stop

    @property
    def stamp(self) -> str:
        """Of the store, and which rows."""
        return f"{self._rows.stamp} {hashlib.sha256(self._numbers.tobytes()).hexdigest()}"

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`, which may be spread over many chunks."""
        numbers = self._numbers[start:stop]
        size = self._rows.layout.rows_per_chunk
        order = np.argsort(numbers, kind="stable")
        ends = np.flatnonzero(np.diff(numbers[order] // size)) + 1
        block: Block = {}
        for places in np.split(order, ends):
            self._stop.check()
            first = int(numbers[places[0]]) // size * size
            chunk = self._rows.block(first, min(first + size, self._rows.layout.rows))
            for name, values in selected(chunk, numbers[places] - first).items():
                if name not in block:
                    block[name] = np.empty((len(numbers), *values.shape[1:]), values.dtype)
                block[name][places] = values
        return block


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
