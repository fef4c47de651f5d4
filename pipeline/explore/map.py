"""A map of the shared space: images and captions on the two directions of most variance."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32

from features.storage.files import appearing
from pipeline.explore.session import Searchable, Session

logger = logging.getLogger(__name__)
POINTS = 20_000
"""Images, and captions, that are drawn at most."""
ROWS_AT_ONCE = 4096
PARTS = ("places", "image_rows", "text_rows", "explained", "gap", "pair_cosine")


@dataclass(frozen=True)
class EmbeddingMap:
    """Where the points are."""

    places: Float32[np.ndarray, "points 2"]
    """Of the images, then of the captions."""
    image_rows: Int32[np.ndarray, "images"]
    text_rows: Int32[np.ndarray, "texts"]
    explained: Float32[np.ndarray, "2"]
    """Fraction of the variance of all points along each direction."""
    gap: Float32[np.ndarray, ""]
    """Distance of the mean image from the mean caption; embeddings have length 1."""
    pair_cosine: Float32[np.ndarray, ""]
    """Mean cosine of an image with its own caption."""

    def as_bytes(self, labels: Int32[np.ndarray, "rows"] | None) -> bytes:
        """Return places (float32), then rows, then labels (int32), little-endian."""
        rows = np.concatenate([self.image_rows, self.text_rows])
        classes = np.full(len(rows), -1) if labels is None else labels[rows]
        parts = [self.places.astype("<f4"), rows.astype("<i4"), classes.astype("<i4")]
        return b"".join(part.tobytes() for part in parts)


def open_map(session: Session, split: str) -> EmbeddingMap:
    """Return the map of a split, made at the first call and kept in `run.dir/search`.

    Principal components of the embeddings themselves, images and captions together, so that what
    sets the two apart (the modality gap) is seen as it is. Of more than `POINTS` rows, as many are
    drawn, evenly spaced.

    Reference:
        Liang et al. 2022, Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive
        Representation Learning, arXiv:2203.02053.
    """
    field = caption_field(session, split)
    images, texts = session.images(split), session.captions(split, field)
    path = images.path.with_name(f"map-{images.path.stem}-{texts.path.stem}.npz")
    if not path.is_file():
        logger.info("drawing the map of %s, once", split)
        made = _drawn(images, texts)
        with appearing(path) as partial, partial.open("wb") as file:
            np.savez(file, **{name: getattr(made, name) for name in PARTS})
    with np.load(path, allow_pickle=False) as archive:
        return EmbeddingMap(*(archive[name] for name in PARTS))


def map_facts(session: Session, split: str) -> dict[str, Any]:
    """Return what is said beside the map."""
    drawn, store = open_map(session, split), session.store(split)
    return {
        "field": caption_field(session, split),
        "images": len(drawn.image_rows),
        "texts": len(drawn.text_rows),
        "rows": store.rows,
        "explained": [float(value) for value in drawn.explained],
        "gap": float(drawn.gap),
        "pair_cosine": float(drawn.pair_cosine),
        "classes": list(store.class_names or ()),
    }


def caption_field(session: Session, split: str) -> str:
    """Return the field whose captions are drawn: that of the longest, by a look at the first."""
    store = session.store(split)
    firsts = {name: store.captions(name, 0, 100) for name in store.fields}
    return max(firsts, key=lambda name: sum(map(len, firsts[name])))


def _drawn(images: Searchable, texts: Searchable) -> EmbeddingMap:
    of_images, of_texts = _chosen(len(images.rows)), _chosen(len(texts.rows))
    vectors = [images.embeddings[of_images], texts.embeddings[of_texts]]
    means = [each.mean(axis=0, dtype=np.float64) for each in vectors]
    together = np.concatenate(vectors)
    mean, directions, explained = _principal(together)
    places = np.concatenate([block @ directions for block in _blocks(together, mean)])
    pairs = np.intersect1d(images.rows[of_images], texts.rows[of_texts])
    pair_images = images.embeddings[np.searchsorted(images.rows, pairs)].astype(np.float32)
    pair_texts = texts.embeddings[np.searchsorted(texts.rows, pairs)].astype(np.float32)
    return EmbeddingMap(
        places=places.astype(np.float32),
        image_rows=images.rows[of_images].astype(np.int32),
        text_rows=texts.rows[of_texts].astype(np.int32),
        explained=explained.astype(np.float32),
        gap=np.array(np.linalg.norm(means[0] - means[1]), dtype=np.float32),
        pair_cosine=np.array((pair_images * pair_texts).sum(axis=1).mean(), dtype=np.float32),
    )


def _principal(
    vectors: np.ndarray,
) -> tuple[Float64[np.ndarray, "dim"], Float64[np.ndarray, "dim 2"], Float64[np.ndarray, "2"]]:
    """Return the mean, the two directions of most variance, and the fraction that each has."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    covariance = sum(block.T @ block for block in _blocks(vectors, mean)) / len(vectors)
    values, directions = np.linalg.eigh(covariance)
    largest = directions[:, ::-1][:, :2]
    signs = np.sign(largest[np.abs(largest).argmax(axis=0), [0, 1]])  # the same at every call
    return mean, largest * signs, values[::-1][:2] / values.sum()


def _blocks(vectors: np.ndarray, mean: np.ndarray) -> Iterator[np.ndarray]:
    starts = range(0, len(vectors), ROWS_AT_ONCE)
    return (vectors[start : start + ROWS_AT_ONCE].astype(np.float64) - mean for start in starts)


def _chosen(count: int) -> np.ndarray:
    return np.linspace(0, count, min(count, POINTS), endpoint=False, dtype=np.int64)
