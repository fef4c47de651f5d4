"""`--to embedding-atlas`: the images of a run as one parquet file that Embedding Atlas opens.

A row is an image: its key and split, its captions and class, the embedding of the head, its place
on a map of two principal components, and its nearest other images.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from evaluate.embedder import Embedded, Embedder
from evaluate.nearest import Neighbours, approximate_neighbours, blocks_of, nearest_others
from features.errors import UnusableSplitError
from features.store import FeatureStore
from pipeline.card import TEMPLATES
from pipeline.export.parts import Parts
from pipeline.run.folder import open_store, run_folder

FILE = "images.parquet"
NEIGHBOURS = 15
EXACT_UP_TO = 50_000
"""Of so many rows all pairs are compared; of more most of the nearest are found."""
FITTED_ON = 50_000
ROWS_AT_ONCE = 4096
NEAREST = pa.struct({"ids": pa.list_(pa.int64()), "distances": pa.list_(pa.float32())})
"""As Embedding Atlas reads it: numbers of rows of the file, and 1 - cosine."""


def write(parts: Parts, folder: Path) -> str:
    """Write the file; return the command that opens it.

    Raises:
        UnusableSplitError: No split has an image that can be used.
    """
    aligned = parts.aligned
    embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
    runs = run_folder(aligned.config)
    stores = {split: open_store(aligned.config, runs, split) for split in aligned.config.data}
    found = list(_embedded(embedder, stores))
    vectors = np.concatenate([images.vectors.cpu().numpy() for _, _, images in found])
    nearest = _nearest(vectors)
    fields = list(dict.fromkeys(field for _, store, _ in found for field in store.fields))
    fixed = {"key": pa.string(), "split": pa.string(), "label": pa.string()}
    texts = {_caption_name(fields, field): pa.string() for field in fields}
    schema = pa.schema(
        fixed
        | texts
        | {"embedding": pa.list_(pa.float32(), vectors.shape[1])}
        | {"x": pa.float32(), "y": pa.float32(), "neighbors": NEAREST}
    )
    places = _map(vectors)
    start = 0
    with pq.ParquetWriter(folder / FILE, schema) as writer:
        for split, store, images in found:
            for first in range(0, len(images.rows), ROWS_AT_ONCE):
                rows = images.rows[first : first + ROWS_AT_ONCE]
                part = slice(start, start + len(rows))
                table = _described(split, store, rows, fields) | {
                    "embedding": list(vectors[part]),
                    "x": places[part, 0],
                    "y": places[part, 1],
                    "neighbors": [
                        {"ids": ids, "distances": 1 - cosines}
                        for ids, cosines in zip(
                            nearest.rows[part], nearest.cosines[part], strict=True
                        )
                    ],
                }
                writer.write_table(pa.table(table, schema=schema))
                start = part.stop
    return TEMPLATES.get_template("embedding_atlas.md.j2").render(
        file=FILE, rows=len(vectors), splits=[split for split, _, _ in found], has_text=bool(fields)
    )


def _embedded(
    embedder: Embedder, stores: dict[str, FeatureStore]
) -> Iterator[tuple[str, FeatureStore, Embedded]]:
    """Yield what can be embedded; the last error is raised where nothing can be."""
    error: UnusableSplitError | None = None
    count = 0
    for split, store in stores.items():
        try:
            images = embedder.images(store)
        except UnusableSplitError as fault:
            error = fault
            continue
        count += 1
        yield split, store, images
    if not count and error is not None:
        raise error


def _caption_name(fields: list[str], field: str) -> str:
    """Return what a caption field is called: the first is `caption`, as the command names it."""
    return "caption" if field == fields[0] else f"caption_{field}"


def _described(
    split: str, store: FeatureStore, rows: np.ndarray, fields: list[str]
) -> dict[str, Any]:
    """Return the texts of some rows."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    labels, names = store.labels(), store.class_names
    found: dict[str, Any] = {
        "key": store.keys(first, last)[rows - first].tolist(),
        "split": [split] * len(rows),
        "label": [None] * len(rows),
    }
    if labels is not None:
        of_rows = labels[rows].tolist()
        found["label"] = [
            None if label < 0 else names[label] if names else str(label) for label in of_rows
        ]
    for field in fields:
        has_it = field in store.fields
        texts = store.captions(field, first, last)[rows - first].tolist() if has_it else None
        found[_caption_name(fields, field)] = texts or [None] * len(rows)
    return found


def _nearest(vectors: Float32[np.ndarray, "rows dim"]) -> Neighbours:
    count = min(NEIGHBOURS, len(vectors) - 1)
    if count < 1:
        return Neighbours(np.empty((1, 0), np.float32), np.empty((1, 0), np.int64))
    if len(vectors) <= EXACT_UP_TO:
        return nearest_others(vectors, count)
    found = approximate_neighbours(
        vectors, lambda: blocks_of(vectors), len(vectors), count + 1, seed=0
    ).neighbours
    is_other = found.rows != np.arange(len(vectors))[:, None]
    is_other[is_other.all(axis=1), -1] = False  # as many of each row
    return Neighbours(
        found.cosines[is_other].reshape(-1, count), found.rows[is_other].reshape(-1, count)
    )


def _map(vectors: Float32[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows 2"]:
    """Return the first two principal components."""
    from sklearn.decomposition import PCA  # which takes a second to import

    if len(vectors) < 2 or vectors.shape[1] < 2:
        return np.zeros((len(vectors), 2), dtype=np.float32)
    chosen = np.linspace(0, len(vectors), min(len(vectors), FITTED_ON), endpoint=False, dtype=int)
    pca = PCA(2, svd_solver="covariance_eigh").fit(vectors[chosen])
    places: np.ndarray = pca.transform(vectors).astype(np.float32)
    return places
