"""How a store is: rows by status, what is quarantined, lengths, and rows that nearly repeat."""

from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from features.errors import StoreError
from features.status import Status
from features.storage.column import Column
from pipeline.explore.session import Session
from pipeline.stores.inspect import ALIKE

CHUNKS_LOOKED_AT = 16
BINS = 32
ROWS_COMPARED = 10_000
PAIRS = 24
ROWS_OF_A_PAGE = 50


def health(session: Session, split: str) -> dict[str, Any]:
    """Return the rows and columns of the store of a split."""
    store = session.store(split)
    columns = [store.column(name) for name in store.columns()]
    return {
        "path": str(store.path),
        "rows": store.rows,
        "rows_per_chunk": store.rows_per_chunk,
        "fields": list(store.fields),
        "classes": len(store.class_names or ()),
        "source": {key: value for key, value in store.source.items() if key in ("kind", "path")},
        "columns": [_column_facts(column) for column in columns],
    }


def quarantined(session: Session, split: str, column: str, start: int) -> dict[str, Any]:
    """Return rows that are quarantined in a column, some from a place on, and how many there are.

    Raises:
        StoreError: There is no such column.
    """
    store = session.store(split)
    status = _column(session, split, column).status()
    rows = np.flatnonzero(status > Status.OK)
    part = rows[start : start + ROWS_OF_A_PAGE]
    keys = store.strings_at("key", part).tolist()
    return {
        "total": len(rows),
        "rows": [
            {"row": row, "key": str(key), "reason": Status(int(status[row])).label}
            for row, key in zip(part.tolist(), keys, strict=True)
        ],
    }


def near_duplicates(session: Session, split: str, column: str) -> dict[str, Any]:
    """Return the pairs of rows whose features are most alike, each row's with its nearest.

    Of more than `ROWS_COMPARED` rows, as many are compared, evenly spaced.

    Raises:
        StoreError: There is no such column.
    """
    opened = _column(session, split, column)
    rows = opened.ok_rows()
    rows = rows[np.linspace(0, len(rows), min(len(rows), ROWS_COMPARED), False, dtype=np.int64)]
    if len(rows) < 2:
        return {"compared": len(rows), "same": 0, "cosine": ALIKE, "pairs": []}
    features = _features(opened, rows)
    cosines, places = faiss.knn(features, features, 2, metric=faiss.METRIC_INNER_PRODUCT)
    own = places[:, 0] == np.arange(len(rows))  # of rows that are the same, either may be first
    other, cosine = (
        np.where(own, places[:, 1], places[:, 0]),
        np.where(own, cosines[:, 1], cosines[:, 0]),
    )
    pairs = {
        (min(pair), max(pair)): float(value)
        for *pair, value in zip(rows.tolist(), rows[other].tolist(), cosine, strict=True)
    }
    ordered = sorted(pairs.items(), key=lambda item: -item[1])
    return {
        "compared": len(rows),
        "same": sum(value >= ALIKE for value in pairs.values()),
        "cosine": ALIKE,
        "pairs": [
            {"rows": list(pair), "cosine": round(min(value, 1.0), 5)}
            for pair, value in ordered[:PAIRS]
        ],
    }


def _column(session: Session, split: str, name: str) -> Column:
    store = session.store(split)
    if name not in store.columns():
        raise StoreError(
            f"{store.path} has no column {name!r}. One of {store.columns()} was expected. Choose "
            f"one of these."
        )
    return store.column(name)


def _column_facts(column: Column) -> dict[str, Any]:
    codes, counts = np.unique(column.status(), return_counts=True)
    lengths = _lengths(column)
    fingerprint = column.fingerprint
    return {
        "name": column.name,
        "dim": column.dim,
        "dtype": column.dtype.name,
        "status": {
            Status(int(code)).label: int(count) for code, count in zip(codes, counts, strict=True)
        },
        "model": fingerprint.get("model"),
        "pooling": fingerprint.get("pooling"),
        "licence": fingerprint.get("licence"),
        "lengths": _histogram(lengths),
        "looked_at": len(lengths),
    }


def _lengths(column: Column) -> Float32[np.ndarray, "rows"]:
    """Return the lengths of vectors that are ok, of some chunks evenly spaced."""
    status, found = column.status(), [np.empty(0, dtype=np.float32)]
    done = np.setdiff1d(np.arange(column.num_chunks), column.pending())
    some = np.linspace(0, len(done), min(len(done), CHUNKS_LOOKED_AT), False, dtype=np.int64)
    for chunk in done[some].tolist():
        start = chunk * column.rows_per_chunk
        stop = min(start + column.rows_per_chunk, column.rows)
        ok = status[start:stop] == Status.OK
        found.append(np.linalg.norm(column.read(start, stop)[ok].astype(np.float32), axis=1))
    return np.concatenate(found)


def _histogram(lengths: Float32[np.ndarray, "rows"]) -> dict[str, list[float]] | None:
    if not len(lengths):
        return None
    counts, edges = np.histogram(lengths.astype(np.float64), bins=BINS)
    return {"counts": counts.tolist(), "edges": edges.round(4).tolist()}


def _features(column: Column, rows: Int64[np.ndarray, "rows"]) -> Float32[np.ndarray, "rows dim"]:
    """Return the features of rows, normalised."""
    found = column.rows_at(rows).astype(np.float32)
    faiss.normalize_L2(found)
    return found
