"""What a store holds (`sail inspect`), and whether it is whole (`sail verify`)."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from features.column import Column
from features.errors import StoreCorruptError, StoreError
from features.status import Status
from features.storage.place import Place
from features.store import FeatureStore

KEYS_AT_ONCE = 65_536


def describe_store(path: Place) -> dict[str, Any]:
    """Return rows, fields, classes, and for each column its shape, status counts, norms, bytes."""
    store = FeatureStore.open(path)
    return {
        "path": str(path),
        "rows": store.rows,
        "rows_per_chunk": store.rows_per_chunk,
        "caption_fields": list(store.fields),
        "classes": len(store.class_names or ()),
        "keys_sha256": store.keys_sha256,
        "columns": {name: _describe_column(store.column(name)) for name in store.columns()},
        "source": store.source,
    }


def describe_row(path: Place, row: int) -> dict[str, Any]:
    """Return everything the store holds of one row, except the vectors themselves.

    Raises:
        StoreError: The store has no such row.
    """
    store = FeatureStore.open(path)
    if not 0 <= row < store.rows:
        raise StoreError(
            f"{path} has no row {row}. A row from 0 to {store.rows - 1} was expected. Change --row."
        )
    labels, groups = store.labels(), store.groups()
    label = None if labels is None else int(labels[row])
    names = store.class_names
    columns = {}
    for name in store.columns():
        column = store.column(name)
        features = column.read(row, row + 1)[0].astype(np.float32)
        columns[name] = {
            "status": Status(int(column.status()[row])).label,
            "norm": round(float(np.linalg.norm(features)), 4),
            "first": [round(float(value), 4) for value in features[:4]],
        }
    return {
        "row": row,
        "key": str(store.keys(row, row + 1)[0]),
        "captions": {name: str(store.captions(name, row, row + 1)[0]) for name in store.fields},
        "label": label,
        "class": names[label] if names and label is not None and label >= 0 else None,
        "group": None if groups is None else int(groups[row]),
        "columns": columns,
    }


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


def _describe_column(column: Column) -> dict[str, Any]:
    status = column.status()
    codes, counts = np.unique(status, return_counts=True)
    names = [Status(int(code)).label for code in codes]
    done = column.num_chunks - len(column.pending())
    fingerprint = column.fingerprint
    return {
        "shape": [column.rows, column.dim],
        "dtype": column.dtype.name,
        "status": dict(zip(names, map(int, counts), strict=True)),
        "norms": _norms(column, status),
        "bytes": done * column.chunk_bytes,
        "model": fingerprint.get("model"),
        "pooling": fingerprint.get("pooling"),
        "layer": fingerprint.get("layer"),
        "mode": fingerprint.get("mode"),
        "licence": fingerprint.get("licence"),
        "supervision": fingerprint.get("supervision"),
        "weights_sha256": fingerprint.get("weights_sha256"),
    }


def _norms(column: Column, status: np.ndarray) -> dict[str, float] | None:
    """Return the least, mean and greatest length of the vectors that are ok."""
    least, greatest, total, count = np.inf, 0.0, 0.0, 0
    for start in range(0, column.rows, column.rows_per_chunk):
        ok = status[start : start + column.rows_per_chunk] == Status.OK
        if not ok.any():
            continue
        features = column.read(start, start + column.rows_per_chunk)[ok].astype(np.float32)
        norms = np.linalg.norm(features, axis=1)
        least, greatest = min(least, float(norms.min())), max(greatest, float(norms.max()))
        total, count = total + float(norms.sum()), count + len(norms)
    if not count:
        return None
    return {"min": round(least, 3), "mean": round(total / count, 3), "max": round(greatest, 3)}


def _key_faults(store: FeatureStore) -> Iterator[str]:
    digest = hashlib.sha256()
    short = np.empty(store.rows, dtype=np.uint64)  # of each key, so that all fit in memory
    for start in range(0, store.rows, KEYS_AT_ONCE):
        keys = store.keys(start, start + KEYS_AT_ONCE).tolist()
        digest.update(("\n".join(keys) + "\n").encode())
        hashes = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        short[start : start + len(keys)] = np.frombuffer(hashes, dtype=np.uint64)
    order = np.argsort(short, kind="stable")
    for row in np.sort(order[1:][short[order[1:]] == short[order[:-1]]]).tolist():
        key = str(store.keys(row, row + 1)[0])
        yield f"row {row}: the key {key!r} occurs twice; keys are unique. Extract again."
    if digest.hexdigest() != store.keys_sha256:
        yield (
            f"the keys have sha256 {digest.hexdigest()[:12]}…, the store was made with "
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
