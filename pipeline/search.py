"""Search among the rows of a run by a sentence or an image."""

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Int64

from evaluate.embedder import Embedder
from evaluate.nearest import blocks_of, nearest_neighbours
from features.errors import EvaluationError
from features.storage.column import Column
from features.storage.files import appearing, remove_leftovers
from features.storage.reading import read_kept, seal
from features.store import FeatureStore
from features.terminal import harmless
from pipeline.run.aligned import Aligned
from pipeline.run.folder import open_store, run_folder
from pipeline.stores.npy import write_header

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One row that was found."""

    rank: int
    """1 is the nearest."""
    cosine: float
    key: str
    row: int
    captions: dict[str, str]
    """By caption field; of a search among captions the one that was found."""


def search_images(
    aligned: Aligned, split: str, query: Float32[np.ndarray, "1 dim"], top: int
) -> list[Hit]:
    """Return the images of a split that are nearest to a vector, nearest first.

    The first search of a split embeds it; the embeddings stay in `run.dir/search`, or in
    `~/.cache/sail` where that cannot be written.

    Args:
        aligned: The run.
        split: Name in `[data]`.
        query: From `encode_text` or `encode_image`.
        top: How many.

    Raises:
        EvaluationError: The split's features are not all there, or of another encoder.
    """
    store, embedder = _open(aligned, split)
    column = embedder.image_column(store)
    found = _nearest(aligned, embedder, column, query, top)
    return [_hit(store, rank, *each, store.fields) for rank, each in enumerate(found, 1)]


def search_captions(
    aligned: Aligned, split: str, query: Float32[np.ndarray, "1 dim"], top: int
) -> list[Hit]:
    """Return the captions of a split that are nearest to a vector, nearest first.

    Takes and raises what `search_images` does.
    """
    store, embedder = _open(aligned, split)
    every = [
        (cosine, row, field)
        for field in store.fields
        for cosine, row in _nearest(
            aligned, embedder, embedder.text_column(store, field), query, top
        )
    ]
    every.sort(key=lambda each: -each[0])
    return [
        _hit(store, rank, cosine, row, [field])
        for rank, (cosine, row, field) in enumerate(every[:top], 1)
    ]


def embeddings_file(aligned: Aligned, column: Column, rows: Int64[np.ndarray, "ok"]) -> Path:
    """Return where the embeddings of rows of a column are kept; the name stands for all of it."""
    parts = [aligned.checkpoint.sha256, str(column.path), column.name]
    digest = hashlib.sha256("\n".join(parts).encode() + rows.tobytes()).hexdigest()[:16]
    name = harmless(column.name.replace("/", "-"))
    return _kept_in(aligned.config.run.dir) / f"{name}-{digest}.npy"


def open_embeddings(
    aligned: Aligned, embedder: Embedder, column: Column, rows: Int64[np.ndarray, "ok"]
) -> Float16[np.ndarray, "ok dim"]:
    """Return the embeddings of rows of a column, mapped from a file that is made once."""
    path, shape = embeddings_file(aligned, column, rows), (len(rows), aligned.dim)
    if (kept := read_kept(path, shape)) is not None:
        return kept
    logger.info("embedding %d rows of %s, once", len(rows), column.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with appearing(path) as partial:
        with partial.open("wb") as file:
            write_header(file, "<f2", shape)
            for block in embedder.blocks(column, rows):
                file.write(np.ascontiguousarray(block, dtype="<f2").data)
        seal(partial, path.name)
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _kept_in(run: Path) -> Path:
    """Return `run.dir/search`; of a run that others own, or keep safe, a folder of the user's."""
    folder = run / "search"
    if os.access(folder if folder.is_dir() else run, os.W_OK):
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sail" / hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]


def _open(aligned: Aligned, split: str) -> tuple[FeatureStore, Embedder]:
    if split not in aligned.config.data:
        raise EvaluationError(
            f"The run has no split {split!r}. One of {list(aligned.config.data)} was expected. "
            f"Name it with --split."
        )
    store = open_store(aligned.config, run_folder(aligned.config), split)
    return store, Embedder(aligned.model, aligned.checkpoint, aligned.device)


def _nearest(
    aligned: Aligned,
    embedder: Embedder,
    column: Column,
    query: Float32[np.ndarray, "1 dim"],
    top: int,
) -> list[tuple[float, int]]:
    rows = column.ok_rows()
    embeddings = open_embeddings(aligned, embedder, column, rows)
    found = nearest_neighbours(query, blocks_of(embeddings), min(top, len(rows)))
    return [
        (float(cosine), int(rows[place]))
        for cosine, place in zip(found.cosines[0], found.rows[0], strict=True)
    ]


def _hit(store: FeatureStore, rank: int, cosine: float, row: int, fields: Iterable[str]) -> Hit:
    captions = {field: str(store.captions(field, row, row + 1)[0]) for field in fields}
    return Hit(rank, cosine, str(store.keys(row, row + 1)[0]), row, captions)
