"""Search among the rows of a split by words, an image or a row; and the map of its embeddings."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32

from evaluate.nearest import blocks_of, nearest_by_score
from features.errors import EncoderError, EvaluationError
from features.images import ImageFault, open_image
from features.storage.files import appearing
from features.storage.reading import is_sealed, seal
from features.store import FeatureStore
from pipeline.explore.session import Searchable, Session
from pipeline.search import COSINE, Ranking
from pipeline.stores.inspect import describe_row

logger = logging.getLogger(__name__)
MAX_UPLOAD_BYTES = 16 << 20
MAX_UPLOAD_PIXELS = 50_000_000
Among = Literal["images", "captions"]
POINTS = 20_000
"""Images, and captions, that are drawn at most."""
PARTS = ("places", "image_rows", "text_rows", "explained", "gap", "pair_cosine")


@dataclass(frozen=True)
class Shown:
    """A row as the page shows it."""

    row: int
    key: str
    captions: dict[str, str]
    label: str | None
    """Name of its class."""


def vector_of_words(session: Session, words: str) -> Float32[np.ndarray, "dim"]:
    """Embed a sentence."""
    aligned = session.aligned()
    with session.encoding:
        vector: np.ndarray = aligned.encode_text([words])[0]
    return vector


def vector_of_image(session: Session, data: bytes) -> Float32[np.ndarray, "dim"]:
    """Embed an image that was sent; one is decoded at a time, so that memory stays bounded.

    Raises:
        EncoderError: It is no image, damaged, or of more than `MAX_UPLOAD_PIXELS` pixels, which is
            seen before any is decoded.
    """
    aligned = session.aligned()
    with session.encoding:
        try:
            open_image(data, max_pixels=MAX_UPLOAD_PIXELS)
        except ImageFault as fault:
            raise EncoderError(
                f"The image cannot be used: {fault.reason}. A whole image of at most "
                f"{MAX_UPLOAD_PIXELS // 1_000_000} million pixels was expected. Send another one."
            ) from fault
        vector: np.ndarray = aligned.encode_image([data])[0]
    return vector


def vector_of_row(session: Session, split: str, row: int) -> Float32[np.ndarray, "dim"]:
    """Return the embedding of the image of a row.

    Raises:
        EvaluationError: There is no such row, or it is quarantined.
    """
    vector = session.images(split).vector(row)
    if vector is None:
        raise EvaluationError(
            f"Row {row} of {split} has no embedding. A row whose image is ok was expected. "
            f"Choose another; the store view says why this one is not."
        )
    return vector


def find(
    session: Session,
    split: str,
    vector: Float32[np.ndarray, "dim"],
    among: Among,
    top: int,
    by: Ranking = COSINE,
) -> dict[str, Any]:
    """Return the rows nearest to a vector, and how they were found.

    Args:
        session: The run.
        split: Where to search.
        vector: What is searched for.
        among: Its images, or its captions of all fields.
        top: How many.
        by: What comes first. The first search by a score reads features of the training.

    Raises:
        EvaluationError: A score has no bank.
    """
    store = session.store(split)
    fields: list[str | None] = [None] if among == "images" else list(store.fields)
    columns = [(field, _column(session, split, field)) for field in fields]
    started = time.perf_counter()
    hits: list[tuple[float, float, int, str | None]] = []
    for field, column in columns:
        offsets = np.zeros(len(column.rows), dtype=np.float32)
        if by.score is None:
            found = column.search(vector, top)
        else:
            offsets = session.offsets(split, field, by)
            k = min(top, len(offsets))
            found = nearest_by_score(vector[None], blocks_of(column.embeddings), offsets, k)
        for cosine, place in zip(found.cosines[0], found.rows[0], strict=True):
            score = float(cosine - offsets[place])
            hits.append((score, float(cosine), int(column.rows[place]), field))
    hits = sorted(hits, key=lambda hit: -hit[0])[:top]
    shown = show(session, store, [row for _, _, row, _ in hits])
    seconds = time.perf_counter() - started
    return {
        "hits": [
            asdict(each) | {"cosine": round(cosine, 4), "field": field}
            for each, (_, cosine, _, field) in zip(shown, hits, strict=True)
        ],
        "milliseconds": round(1000 * seconds, 1),
        "searched": sum(len(column.rows) for _, column in columns),
        "method": columns[0][1].search.name if columns and by.score is None else "exact",
    }


def look(session: Session, split: str, count: int) -> list[Shown]:
    """Return some rows of a split, evenly spaced."""
    store = session.store(split)
    rows = np.linspace(0, store.rows, min(count, store.rows), endpoint=False, dtype=np.int64)
    return show(session, store, rows.tolist())


def row_facts(session: Session, split: str, row: int) -> dict[str, Any]:
    """Return what is shown of one row, and what became of it in every column.

    Raises:
        StoreError: The store has no such row.
    """
    store = session.checked(split, row)
    columns = describe_row(store.path, row)["columns"]
    return {**asdict(show(session, store, [row])[0]), "rows": store.rows, "columns": columns}


def show(session: Session, store: FeatureStore, rows: Sequence[int]) -> list[Shown]:
    """Return what is shown of rows."""
    places = np.array(rows, dtype=np.int64)
    keys = store.strings_at("key", places).tolist()
    captions = {name: store.strings_at(f"caption/{name}", places) for name in store.fields}
    return [
        Shown(
            row=row,
            key=str(keys[i]),
            captions={name: str(texts[i]) for name, texts in captions.items()},
            label=session.class_of(store, row),
        )
        for i, row in enumerate(rows)
    ]


def _column(session: Session, split: str, field: str | None) -> Searchable:
    return session.images(split) if field is None else session.captions(split, field)


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
    if not is_sealed(path):
        logger.info("drawing the map of %s, once", split)
        made = _drawn(images, texts)
        with appearing(path) as partial:
            with partial.open("wb") as file:
                np.savez(file, **{name: getattr(made, name) for name in PARTS})
            seal(partial, path.name)
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
    from sklearn.decomposition import PCA  # which takes a second to import

    of_images, of_texts = _chosen(len(images.rows)), _chosen(len(texts.rows))
    vectors = [
        images.embeddings[of_images].astype(np.float32),
        texts.embeddings[of_texts].astype(np.float32),
    ]
    pca = PCA(2, svd_solver="covariance_eigh")
    places = pca.fit_transform(np.concatenate(vectors))
    means = [each.mean(axis=0, dtype=np.float64) for each in vectors]
    _, image, text = np.intersect1d(
        images.rows[of_images], texts.rows[of_texts], return_indices=True
    )
    return EmbeddingMap(
        places=places.astype(np.float32),
        image_rows=images.rows[of_images].astype(np.int32),
        text_rows=texts.rows[of_texts].astype(np.int32),
        explained=pca.explained_variance_ratio_.astype(np.float32),
        gap=np.array(np.linalg.norm(means[0] - means[1]), dtype=np.float32),
        pair_cosine=np.array(
            (vectors[0][image] * vectors[1][text]).sum(axis=1).mean(), dtype=np.float32
        ),
    )


def _chosen(count: int) -> np.ndarray:
    return np.linspace(0, count, min(count, POINTS), endpoint=False, dtype=np.int64)
