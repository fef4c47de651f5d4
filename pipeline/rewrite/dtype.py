"""`sail convert --dtype`: a store with features of another type, and what that costs."""

import numpy as np
from jaxtyping import Float32, Int64

from features.column import Column
from features.errors import StoreMismatchError
from features.status import Status
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.formats.store import complete_columns
from pipeline.interrupt import Stopped, StopRequest
from pipeline.progress import ProgressLine

QUERIES, SAMPLE, NEIGHBOURS = 1000, 10_000, 10


def convert_store(
    path: Place, out: Place, dtype: str, stop: StopRequest
) -> dict[str, dict[str, float]]:
    """Write a store again with features of another type, as far as that is not done.

    Args:
        path: The store.
        out: Where the new one goes; a part of it that is there is gone on with.
        dtype: `int8` or `float16`.
        stop: Asked after every chunk.

    Returns:
        For each column how far its features are from those of the store: `relative_error_mean` and
        `_max` (length of the difference / length, over all rows that are ok), `same_neighbours`
        (fraction of the 10 nearest of 10,000 rows by cosine that are the same, over 1000 queries;
        fewer where there are not as many), `bytes` and `bytes_before`.

    Raises:
        StoreError: A column has chunks that are not done, or `out` is a store of something else.
        Stopped: A signal came; what is done is on disk.
    """
    source = FeatureStore.open(path)
    columns = complete_columns(source)
    target = source.copy_rows(out)
    losses = {}
    for column in columns:
        encoder = "/".join(column.name.split("/")[:2])
        target.add_encoder(encoder, column.fingerprint, dim=column.dim, dtype=dtype)
        converted = target.column(column.name)
        if converted.dtype != dtype:
            raise StoreMismatchError(
                str(converted.path), "dtype", found=converted.dtype.name, expected=dtype
            )
        _convert(column, converted, stop)
        losses[column.name] = _loss(column, converted)
    return losses


def _convert(column: Column, converted: Column, stop: StopRequest) -> None:
    status, pending = column.status(), converted.pending()
    converted.remove_leftovers()
    with ProgressLine(column.name, len(pending), "chunks") as line:
        for chunk in pending:
            if stop():
                raise Stopped
            start = chunk * column.rows_per_chunk
            part = slice(start, start + column.chunk_rows(chunk))
            converted.write(chunk, column.read(part.start, part.stop), status[part])
            line.advance(1)


def _loss(column: Column, converted: Column) -> dict[str, float]:
    ok = np.flatnonzero(column.status() == Status.OK)
    errors = [
        _relative_errors(column, converted, ok[first : first + column.rows_per_chunk])
        for first in range(0, len(ok), column.rows_per_chunk)
    ]
    every = np.concatenate([np.zeros(0, dtype=np.float32), *errors])
    return {
        "relative_error_mean": float(every.mean()) if len(every) else 0.0,
        "relative_error_max": float(every.max(initial=0)),
        "same_neighbours": _same_neighbours(column, converted, ok),
        "bytes": float(converted.num_chunks * converted.chunk_bytes),
        "bytes_before": float(column.num_chunks * column.chunk_bytes),
    }


def _relative_errors(
    column: Column, converted: Column, rows: Int64[np.ndarray, "rows"]
) -> Float32[np.ndarray, "rows"]:
    before, after = (_features(each, rows) for each in (column, converted))
    errors: np.ndarray = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
    return errors


def _same_neighbours(column: Column, converted: Column, ok: Int64[np.ndarray, "ok"]) -> float:
    """Compare the nearest rows, by cosine, of some rows among a sample."""
    random = np.random.default_rng(0)
    rows = np.sort(random.choice(ok, min(SAMPLE, len(ok)), replace=False))
    queries = random.choice(len(rows), min(QUERIES, len(rows)), replace=False)
    count = min(NEIGHBOURS, len(rows) - 1)
    if count < 1:
        return 1.0
    before, after = (
        _nearest(_features(each, rows), queries, count) for each in (column, converted)
    )
    same = [len(set(a) & set(b)) for a, b in zip(before.tolist(), after.tolist(), strict=True)]
    return float(np.mean(same) / count)


def _nearest(
    features: Float32[np.ndarray, "rows dim"], queries: Int64[np.ndarray, "queries"], count: int
) -> Int64[np.ndarray, "queries count"]:
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = features[queries] @ features.T
    cosine[np.arange(len(queries)), queries] = -np.inf  # a row is not its own neighbour
    nearest: np.ndarray = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
    return nearest


def _features(column: Column, rows: Int64[np.ndarray, "rows"]) -> Float32[np.ndarray, "rows dim"]:
    """Read rows, which are in order, chunk by chunk."""
    features = np.empty((len(rows), column.dim), dtype=np.float32)
    for chunk in np.unique(rows // column.rows_per_chunk).tolist():
        start = chunk * column.rows_per_chunk
        inside = rows // column.rows_per_chunk == chunk
        block = column.read(start, start + column.rows_per_chunk)
        features[inside] = block[rows[inside] - start]
    return features
