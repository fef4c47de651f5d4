"""Whether a store is whole (`sail verify`)."""

from collections.abc import Iterator

import numpy as np

from features.errors import StoreCorruptError
from features.status import Status
from features.storage.column import Column
from features.storage.place import Place
from features.store import KEYS_AT_ONCE, FeatureStore
from pipeline.stores.writer import KeyCheck


def verify_store(path: Place) -> list[str]:
    """Read every chunk of a store and return what is wrong, one sentence each.

    Checked: checksums and lengths of all chunks; that keys are unique and those that were written;
    that every row is accounted for; that rows that are ok are finite and not zero, and the others
    are zero; that no chunk lies outside the store.
    """
    store = FeatureStore.open(path)
    faults = list(_key_faults(store))
    for name in store.columns():
        column = store.column(name)
        faults += _column_faults(column)
    return faults


def _key_faults(store: FeatureStore) -> Iterator[str]:
    check = KeyCheck(store.rows)
    for start in range(0, store.rows, KEYS_AT_ONCE):
        check.add(store.keys(start, start + KEYS_AT_ONCE))
    for _, row in check.repeated():
        key = str(store.keys(row, row + 1)[0])
        yield f"row {row}: the key {key!r} occurs twice; keys are unique. Extract again."
    if check.sha256 != store.keys_sha256:
        yield (
            f"the keys have sha256 {check.sha256[:12]}…, the store was made with "
            f"{store.keys_sha256[:12]}…: rows and features may not belong together. Extract again."
        )


def _column_faults(column: Column) -> list[str]:
    faults = []
    buffer = np.empty((column.rows_per_chunk, column.dim), dtype=column.dtype)
    try:
        status = column.status()
    except StoreCorruptError as error:
        return [str(error)]
    pending = set(column.pending())
    for chunk in range(column.num_chunks):
        if chunk in pending:
            faults.append(
                f"{column.path}: chunk {chunk} is not done. Run `sail extract` again to finish it."
            )
            continue
        first = chunk * column.rows_per_chunk
        try:
            rows = column.read_into(chunk, buffer, verify=True)
            features = column.restored(chunk, buffer[:rows])
        except StoreCorruptError as error:
            faults.append(str(error))
            continue
        faults += _row_faults(column, first, features, status[first : first + rows])
    return faults


def _row_faults(
    column: Column, first: int, features: np.ndarray, status: np.ndarray
) -> Iterator[str]:
    ok = status == Status.OK
    zero = ~features.any(axis=1)
    known = np.isin(status, [int(code) for code in Status if code != Status.PENDING])
    checks = [
        (ok & ~np.isfinite(features).all(axis=1), "is ok but holds NaN or infinity"),
        (ok & zero, "is ok but all zero"),
        (~ok & ~zero, "is quarantined but not zero"),
        (~known, "has an unknown status"),
    ]
    for wrong, what in checks:
        for i in np.flatnonzero(wrong)[:3]:
            yield (
                f"{column.path}: row {first + i} {what}. Delete status chunk "
                f"{first // column.rows_per_chunk} of this column and run `sail extract` again."
            )
