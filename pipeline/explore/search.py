"""Search among the rows of a split: by words, by an image that was sent, or by another row."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from features.errors import EncoderError, EvaluationError
from features.images import ImageFault, open_image
from features.store import FeatureStore
from pipeline.explore.session import Searchable, Session
from pipeline.stores.inspect import describe_row

MAX_UPLOAD_BYTES = 16 << 20
MAX_UPLOAD_PIXELS = 50_000_000
Among = Literal["images", "captions"]


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
    session: Session, split: str, vector: Float32[np.ndarray, "dim"], among: Among, top: int
) -> dict[str, Any]:
    """Return the rows nearest to a vector, and how they were found.

    Args:
        session: The run.
        split: Where to search.
        vector: What is searched for.
        among: Its images, or its captions of all fields.
        top: How many.
    """
    store = session.store(split)
    fields: list[str | None] = [None] if among == "images" else list(store.fields)
    columns = [(field, _column(session, split, field)) for field in fields]
    started = time.perf_counter()
    hits: list[tuple[float, int, str | None]] = []
    for field, column in columns:
        found = column.search(vector, top)
        rows = column.rows[found.places]
        hits += [(float(c), int(row), field) for c, row in zip(found.cosines, rows, strict=True)]
    hits = sorted(hits, key=lambda hit: -hit[0])[:top]
    shown = show(session, store, [row for _, row, _ in hits])
    seconds = time.perf_counter() - started
    return {
        "hits": [
            asdict(each) | {"cosine": round(cosine, 4), "field": field}
            for each, (cosine, _, field) in zip(shown, hits, strict=True)
        ],
        "milliseconds": round(1000 * seconds, 1),
        "searched": sum(len(column.rows) for _, column in columns),
        "method": columns[0][1].search.name if columns else "exact",
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
