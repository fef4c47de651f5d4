"""Search among the rows of a run by a sentence or an image."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64

from evaluate.config import Score
from evaluate.embedder import Embedder
from evaluate.hubness import KINDS, Bank, Kind, draw_bank
from evaluate.nearest import blocks_of, nearest_by_score, nearest_neighbours
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
class Ranking:
    """By what rows are ranked."""

    asked_by: Kind = "text"
    """The kind of the query."""
    score: Score | None = None
    """The cosine if none."""


COSINE = Ranking()


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
    aligned: Aligned,
    split: str,
    query: Float32[np.ndarray, "1 dim"],
    top: int,
    by: Ranking = COSINE,
) -> list[Hit]:
    """Return the images of a split that are nearest to a vector, nearest first.

    The first search of a split embeds it; the embeddings stay in `run.dir/search`, or in
    `~/.cache/sail` where that cannot be written.

    Args:
        aligned: The run.
        split: Name in `[data]`.
        query: From `encode_text` or `encode_image`.
        top: How many.
        by: What comes first. A score takes its bank from the features of the training, once.

    Raises:
        EvaluationError: The split's features are not all there, or of another encoder; or a score
            has no bank.
    """
    store, embedder = _open(aligned, split)
    column = embedder.image_column(store)
    found = _nearest(aligned, embedder, column, query, top, by)
    return [_hit(store, rank, *each[1:], store.fields) for rank, each in enumerate(found, 1)]


def search_captions(
    aligned: Aligned,
    split: str,
    query: Float32[np.ndarray, "1 dim"],
    top: int,
    by: Ranking = COSINE,
) -> list[Hit]:
    """Return the captions of a split that are nearest to a vector, nearest first.

    Takes and raises what `search_images` does.
    """
    store, embedder = _open(aligned, split)
    every = [
        (score, cosine, row, field)
        for field in store.fields
        for score, cosine, row in _nearest(
            aligned, embedder, embedder.text_column(store, field), query, top, by
        )
    ]
    every.sort(key=lambda each: -each[0])
    return [
        _hit(store, rank, cosine, row, [field])
        for rank, (_, cosine, row, field) in enumerate(every[:top], 1)
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

    def embedded() -> Iterator[np.ndarray]:
        logger.info("embedding %d rows of %s, once", len(rows), column.name)
        return embedder.blocks(column, rows)

    return _kept(path, shape, "<f2", embedded)


def open_offsets(
    aligned: Aligned,
    embedder: Embedder,
    column: Column,
    rows: Int64[np.ndarray, "ok"],
    by: Ranking,
) -> Float32[np.ndarray, "ok"]:
    """Return what a score takes off the cosine of each row, mapped from a file that is made once.

    Raises:
        EvaluationError: There are no features of the training for its bank.
    """
    if (score := by.score) is None:
        raise ValueError("The plain cosine has no offsets.")
    config = aligned.config
    folder = run_folder(config)
    trained = [name for name in config.trained_splits if FeatureStore.is_at(folder.store(name))]
    stores = {name: open_store(config, folder, name) for name in trained}
    drawn = draw_bank(embedder, stores, trained, config.eval.seed)
    files = [embeddings_file(aligned, *each).name for kind in KINDS for each in drawn[kind]]
    digest = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    path = embeddings_file(aligned, column, rows)
    path = path.with_name(f"{path.stem}-{by.score}-{by.asked_by}-{digest}.npy")

    def made() -> Iterator[np.ndarray]:
        def read(column: Column, rows: Int64[np.ndarray, "rows"]) -> np.ndarray:
            return open_embeddings(aligned, embedder, column, rows)

        bank = Bank.of(drawn, read, aligned.device)
        scale = aligned.model.scale_and_bias[0]
        for block in blocks_of(open_embeddings(aligned, embedder, column, rows)):
            gallery = torch.from_numpy(block.astype(np.float32)).to(aligned.device)
            offsets = bank.offsets(score, gallery, asked_by=by.asked_by, scale=scale)
            yield offsets.cpu().numpy()

    return _kept(path, (len(rows),), "<f4", made)


def _kept(
    path: Path, shape: tuple[int, ...], dtype: str, make: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """Return an array that is mapped from a file, which is made of blocks where it is not there."""
    if (kept := read_kept(path, shape, dtype)) is not None:
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with appearing(path) as partial:
        with partial.open("wb") as file:
            write_header(file, dtype, shape)
            for block in make():
                file.write(np.ascontiguousarray(block, dtype=dtype).data)
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
    by: Ranking,
) -> list[tuple[float, float, int]]:
    """Return score, cosine and row of the best rows."""
    rows = column.ok_rows()
    blocks, top = blocks_of(open_embeddings(aligned, embedder, column, rows)), min(top, len(rows))
    offsets = np.zeros(len(rows), dtype=np.float32)
    if by.score is None:
        found = nearest_neighbours(query, blocks, top)
    else:
        offsets = open_offsets(aligned, embedder, column, rows, by)
        found = nearest_by_score(query, blocks, offsets, top)
    return [
        (float(cosine - offsets[place]), float(cosine), int(rows[place]))
        for cosine, place in zip(found.cosines[0], found.rows[0], strict=True)
    ]


def _hit(store: FeatureStore, rank: int, cosine: float, row: int, fields: Iterable[str]) -> Hit:
    captions = {field: str(store.captions(field, row, row + 1)[0]) for field in fields}
    return Hit(rank, cosine, str(store.keys(row, row + 1)[0]), row, captions)
