"""What a store holds (`sail inspect`)."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from features.column import Column
from features.errors import StoreError
from features.status import Status
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.inspection.statistics import ROWS_READ, column_statistics

SAMPLES = 3


def describe_store(path: Place, *, rows_read: int = ROWS_READ) -> dict[str, Any]:
    """Return what a store says of itself, and what its columns hold.

    Args:
        path: The store.
        rows_read: About how many rows of every column the statistics are of: whole chunks, evenly
            spread.

    Returns:
        Rows, fields, classes, source; some rows with their captions; and for each column its shape,
        fingerprint, bytes, rows per status, and `statistics` (see
        `pipeline.inspection.statistics`).

    Raises:
        StoreCorruptError: A chunk is damaged.
    """
    store = FeatureStore.open(path)
    labels = store.labels()
    samples = np.unique(np.linspace(0, store.rows - 1, SAMPLES).astype(int)).tolist()
    return {
        "path": str(path),
        "rows": store.rows,
        "rows_per_chunk": store.rows_per_chunk,
        "caption_fields": list(store.fields),
        "classes": len(store.class_names or ()),
        "keys_sha256": store.keys_sha256,
        "columns": {
            name: _describe_column(store.column(name), rows_read) for name in store.columns()
        },
        "samples": [_named(store, row, labels) for row in samples],
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
    groups = store.groups()
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
        **_named(store, row, store.labels()),
        "group": None if groups is None else int(groups[row]),
        "columns": columns,
    }


def _named(
    store: FeatureStore, row: int, labels: Int32[np.ndarray, "rows"] | None
) -> dict[str, Any]:
    """Return what a row is called and what is said of it."""
    label = None if labels is None else int(labels[row])
    names = store.class_names
    return {
        "row": row,
        "key": str(store.keys(row, row + 1)[0]),
        "captions": {name: str(store.captions(name, row, row + 1)[0]) for name in store.fields},
        "label": label,
        "class": names[label] if names and label is not None and label >= 0 else None,
    }


def _describe_column(column: Column, rows_read: int) -> dict[str, Any]:
    status = column.status()
    codes, counts = np.unique(status, return_counts=True)
    names = [Status(int(code)).label for code in codes]
    done = column.num_chunks - len(column.pending())
    return {
        "shape": [column.rows, column.dim],
        "dtype": column.dtype.name,
        "status": dict(zip(names, map(int, counts), strict=True)),
        "bytes": done * column.chunk_bytes,
        "fingerprint": column.fingerprint,
        "statistics": column_statistics(column, status, rows_read),
    }
