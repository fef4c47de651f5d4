"""Statistics of a column of features, by Dask: chunk by chunk, in one pass over its files."""

from typing import Any

import dask.array
import numpy as np
import zarr
from dask.base import compute
from jaxtyping import Bool, Float32, Int64, UInt8

from features.column import Column
from features.errors import StoreCorruptError
from features.status import Status
from features.storage.files import zarr_store

ROWS_READ = 1 << 18
WORKERS = 4
"""Chunks that are in memory at a time."""
QUERIES, QUERY_CHUNKS = 256, 8
ALIKE = 0.99
"""Cosine from which on two rows are near-duplicates."""
CONSTANT = 1e-6
"""A dimension whose sd is less than this part of the mean sd says nothing."""


def column_statistics(
    column: Column, status: UInt8[np.ndarray, "rows"], rows_read: int
) -> dict[str, Any] | None:
    """Measure the rows of a column that are ok.

    Args:
        column: Whose features.
        status: Of all rows.
        rows_read: About how many rows to read: whole chunks, evenly spread.

    Returns:
        `rows` that were measured; `norms`: `min`, `mean`, `median`, `max` length of a vector;
        `dimensions`: `mean` and `sd` of each, how many are `constant`, and the part of all variance
        that the largest has (`largest_share`); `near_duplicates`: the `fraction` of some `queries`
        with another row among the measured whose cosine is at least `cosine`, a lower bound where
        not all rows are read. None where no row is ok.

    Raises:
        StoreCorruptError: A chunk is damaged.
    """
    chunks = _chunks(column, rows_read)
    size = column.rows_per_chunk
    ok = (
        np.concatenate([status[chunk * size : (chunk + 1) * size] for chunk in chunks]) == Status.OK
    )
    if not ok.any():
        return None
    features = _features(column, chunks)
    queries = _queries(column, chunks, ok)
    lengths = dask.array.sqrt((features * features).sum(axis=1))
    products = features @ queries.T
    alike = (products >= ALIKE * lengths[:, None]) & (lengths[:, None] > 0)
    wanted = (
        lengths,
        features.sum(axis=0, dtype=np.float64),
        (features.astype(np.float64) ** 2).sum(axis=0),
        alike.sum(axis=0),
    )
    try:
        norms, total, squares, count = compute(*wanted, scheduler="threads", num_workers=WORKERS)
    except ValueError as error:  # so zarr calls a checksum that does not fit
        raise StoreCorruptError(column.path / "features", str(error)) from error
    norms, rows = norms[ok], int(ok.sum())
    return {
        "rows": rows,
        "norms": {
            "min": round(float(norms.min()), 3),
            "mean": round(float(norms.mean(dtype=np.float64)), 3),
            "median": round(float(np.median(norms)), 3),
            "max": round(float(norms.max()), 3),
        },
        "dimensions": _dimensions(total / rows, squares / rows),
        "near_duplicates": {
            "queries": len(queries),
            "cosine": ALIKE,
            "fraction": float((count > 1).mean()),  # each query is like itself
        },
    }


def _dimensions(mean: np.ndarray, mean_square: np.ndarray) -> dict[str, Any]:
    variance = np.maximum(mean_square - mean**2, 0)
    sd = np.sqrt(variance)
    total = float(variance.sum())
    return {
        "mean": [float(f"{value:.5g}") for value in mean],
        "sd": [float(f"{value:.5g}") for value in sd],
        "constant": int((sd <= CONSTANT * max(float(sd.mean()), np.finfo(float).tiny)).sum()),
        "largest_share": round(float(variance.max()) / total, 5) if total else 0.0,
    }


def _chunks(column: Column, rows_read: int) -> Int64[np.ndarray, "chunks"]:
    count = min(column.num_chunks, max(1, -(-rows_read // column.rows_per_chunk)))
    return np.unique(np.linspace(0, column.num_chunks - 1, count).round().astype(np.int64))


def _features(column: Column, chunks: Int64[np.ndarray, "chunks"]) -> Any:
    """Return the rows of some chunks as a Dask array of float32, zero where they are not ok."""

    def opened(name: str) -> Any:
        array = zarr.open_array(zarr_store(column.path / name), mode="r", zarr_format=3)
        lazy = dask.array.from_zarr(array)[: column.rows]
        return lazy.blocks[chunks.tolist()].astype(np.float32)

    features = opened("features")
    return features * opened("scale")[:, None] if column.is_scaled else features


def _queries(
    column: Column, chunks: Int64[np.ndarray, "chunks"], ok: Bool[np.ndarray, "rows"]
) -> Float32[np.ndarray, "queries dim"]:
    """Draw rows that are ok, of a few chunks, and return them with length 1."""
    random, size = np.random.default_rng(0), column.rows_per_chunk
    places = np.flatnonzero(ok)
    drawn = np.unique(places // size)
    if len(drawn) > QUERY_CHUNKS:
        drawn = np.sort(random.choice(drawn, QUERY_CHUNKS, replace=False))
    parts = []
    for place in drawn.tolist():
        among = places[places // size == place] - place * size
        count = min(len(among), -(-QUERIES // len(drawn)))
        start = int(chunks[place]) * size
        part = column.read(start, start + size).astype(np.float32)
        parts.append(part[random.choice(among, count, replace=False)])
    queries = np.concatenate(parts)
    return np.asarray(queries / np.linalg.norm(queries, axis=1, keepdims=True))
