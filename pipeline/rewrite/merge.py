"""`sail merge` and `sail rechunk`: the rows of stores, written again in one."""

from collections.abc import Iterator, Sequence

import numpy as np

from features.errors import StoreError
from features.storage.place import Place
from features.store import NOT_COMPARED, NUMBERS, FeatureStore
from pipeline.formats.rows import STRINGS, Block, Layout, blocks_of, num_rows
from pipeline.formats.store import StoreRows, check_free, write_store
from pipeline.interrupt import StopRequest


def rechunk_store(path: Place, out: Place, rows_per_chunk: int, stop: StopRequest) -> Place:
    """Write a store with chunks of another size: all of it, or nothing.

    Args:
        path: The store; every chunk of its columns must be done.
        out: Where the new one goes; there must be none.
        rows_per_chunk: Of the new one.
        stop: Asked before every chunk of the old one.

    Raises:
        StoreError: The store is not whole, or there is something at `out`.
        Stopped: A signal came; nothing was written.
    """
    check_free(out)
    rows = StoreRows(FeatureStore.open(path), restored=False)
    layout = rows.layout.with_rows_per_chunk(rows_per_chunk)
    return write_store(out, layout, blocks_of(rows, stop), origin=path)


def merge_stores(
    paths: Sequence[Place], out: Place, stop: StopRequest, *, prefix: bool = False
) -> Place:
    """Write the rows of stores behind each other in one: all of it, or nothing.

    Numbers of compositional examples go on from store to store; where a store has no labels or
    groups and others have, they are -1.

    Args:
        paths: The stores, of the same encoders and caption fields.
        out: Where the new one goes; there must be none. Its chunks are as large as the first's.
        stop: Asked before every chunk.
        prefix: Whether keys get the name of their store put before.

    Raises:
        SourceError: A key comes twice.
        StoreError: Two stores differ in an encoder, in captions or in class names, one is not
            whole, or there is something at `out`.
        Stopped: A signal came; nothing was written.
    """
    check_free(out)
    stores = [FeatureStore.open(path) for path in paths]
    are_scaled = {store.column(name).is_scaled for store in stores for name in store.columns()}
    every = [StoreRows(store, restored=len(are_scaled) > 1) for store in stores]
    for rows in every[1:]:
        _check_alike(every[0], rows)
    names = (
        *(name for name in every[0].layout.names if name not in NUMBERS),
        *(name for name in NUMBERS if any(name in rows.layout.names for rows in every)),
    )
    first = every[0].layout
    layout = Layout(
        rows=sum(store.rows for store in stores),
        names=names,
        columns=first.columns,
        fingerprints=first.fingerprints,
        source={
            "kind": "merge",
            "path": [str(path) for path in paths],
            "stores": [origin_of(store) for store in stores],
        },
        rows_per_chunk=first.rows_per_chunk,
        class_names=next((each.layout.class_names for each in every if _labelled(each)), None),
        scaled=first.scaled,
    )
    blocks = _behind_each_other(every, names, stop, prefix=prefix)
    return write_store(out, layout, blocks, origin=" and ".join(map(str, paths)))


def origin_of(store: FeatureStore) -> dict[str, object]:
    """Return what a store that is made of another says of it."""
    return {
        "path": str(store.path),
        "rows": store.rows,
        "keys_sha256": store.keys_sha256,
        "source": store.source,
    }


def _behind_each_other(
    every: Sequence[StoreRows], names: Sequence[str], stop: StopRequest, *, prefix: bool
) -> Iterator[Block]:
    groups = 0
    for rows in every:
        highest = groups
        for block in blocks_of(rows, stop):
            for name in NUMBERS:
                if name in names and name not in block:
                    block[name] = np.full(num_rows(block), -1, dtype=np.int32)
            if "group" in block:
                block["group"] = np.where(block["group"] < 0, -1, block["group"] + groups)
                highest = max(highest, int(block["group"].max()) + 1)
            if prefix:
                keys = [f"{rows.store.path.stem}/{key}" for key in block["key"].tolist()]
                block["key"] = np.array(keys, dtype=STRINGS)
            yield block
        groups = highest


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
        before, after = ours.fingerprints[encoder], theirs.fingerprints[encoder]
        pairs += [
            (f"{encoder}: {field}", before.get(field), after.get(field))
            for field in sorted((before.keys() | after.keys()) - NOT_COMPARED)
        ]
    for what, expected, found in pairs:
        if expected != found:
            raise StoreError(
                f"{place} has {what} = {found!r}, {first.store.path} has {expected!r}. Stores of "
                f"the same encoders, captions and classes were expected. Leave one out, or extract "
                f"it by the recipe of the other."
            )


def _labelled(rows: StoreRows) -> bool:
    return "label" in rows.layout.names
