"""What a store holds: rows, statistics of its columns, a picture of a row (`sail inspect`)."""

from pathlib import Path
from typing import Any

import dask.array
import numpy as np
from dask.base import compute
from dask.delayed import delayed
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image
from rich.text import Text

from features.errors import SourceError, StoreError
from features.images import ImageFault, decode
from features.index import Index, SampleReader
from features.status import Status
from features.storage.column import Column
from features.storage.place import Place
from features.store import FeatureStore

ROWS_READ = 1 << 18
WORKERS = 4
"""Chunks that are in memory at a time."""
QUERIES, QUERY_CHUNKS = 256, 8
ALIKE = 0.99
"""Cosine from which on two rows are near-duplicates."""
SAMPLES = 3
"""Rows that are shown with their captions."""
MAX_PIXELS = 1 << 26
COLUMNS, LINES = 48, 24
"""Characters of a picture."""
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
    norms, total, squares, count = compute(*wanted, scheduler="threads", num_workers=WORKERS)
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
    size = column.rows_per_chunk
    blocks = [
        dask.array.from_delayed(
            delayed(column.read)(chunk * size, (chunk + 1) * size),
            (column.chunk_rows(chunk), column.dim),
            np.float16,
        )
        for chunk in chunks.tolist()
    ]
    return dask.array.concatenate(blocks).astype(np.float32)


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


def describe_store(path: Place, *, rows_read: int = ROWS_READ) -> dict[str, Any]:
    """Return what a store says of itself, and what its columns hold.

    Args:
        path: The store.
        rows_read: About how many rows of every column the statistics are of: whole chunks, evenly
            spread.

    Returns:
        Rows, fields, classes, source; some rows with their captions; and for each column its shape,
        fingerprint, bytes, rows per status, and `statistics` (see `column_statistics`).

    Raises:
        StoreCorruptError: A chunk is damaged.
    """
    store = FeatureStore.open(path)
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
        "samples": [_named(store, row) for row in samples],
        "source": store.source,
    }


def describe_row(path: Place, row: int) -> dict[str, Any]:
    """Return everything the store holds of one row, except the vectors themselves.

    One chunk of each array is read.

    Raises:
        StoreError: The store has no such row.
    """
    store = FeatureStore.open(path)
    if not 0 <= row < store.rows:
        raise StoreError(
            f"{path} has no row {row}. A row from 0 to {store.rows - 1} was expected. Change --row."
        )
    columns = {}
    chunk, offset = divmod(row, store.rows_per_chunk)
    for name in store.columns():
        column = store.column(name)
        features = column.read(row, row + 1)[0].astype(np.float32)
        is_done = not column.pending([chunk])
        status = column.chunk_status(chunk)[offset] if is_done else Status.PENDING
        columns[name] = {
            "status": Status(int(status)).label,
            "norm": round(float(np.linalg.norm(features)), 4),
            "first": [round(float(value), 4) for value in features[:4]],
        }
    return {
        **_named(store, row),
        "group": _number(store, "group", row),
        "columns": columns,
    }


def _number(store: FeatureStore, name: str, row: int) -> int | None:
    return int(store.values(name, row, row + 1)[0]) if name in store.row_arrays else None


def _named(store: FeatureStore, row: int) -> dict[str, Any]:
    label = _number(store, "label", row)
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


def picture_of(store: Place, row: int) -> Text | None:
    """Return the image of a row of a store that lies in the folder of its run.

    Returns:
        The picture, or why it cannot be shown; None where there is no index of images, as of a
        store that was imported or is under a URL.
    """
    if not isinstance(store, Path):
        return None
    index = store.absolute().parent.parent / "index" / f"{store.stem}.parquet"
    if not index.is_file():
        return None
    try:
        data = SampleReader(Index.open(index)).read_row(row)
        return half_blocks(decode(data or b"", max_pixels=MAX_PIXELS, upright=True))
    except (ImageFault, SourceError) as error:
        return Text(f"no picture: {error}", style="dim")


def half_blocks(image: Image.Image) -> Text:
    """Return an image as text: each character is two pixels, one above the other."""
    small = image.copy()
    small.thumbnail((COLUMNS, 2 * LINES))
    pixels = np.asarray(small)  # (height, width, 3)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        blocks = [
            ("▀", f"rgb({above[0]},{above[1]},{above[2]}) on rgb({below[0]},{below[1]},{below[2]})")
            for above, below in zip(upper, lower, strict=True)
        ]
        lines.append(Text.assemble(*blocks))
    return Text("\n").join(lines)
