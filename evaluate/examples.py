"""Examples for the report: which ones, what they found, and their pictures."""

import base64
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image

from features.errors import SourceError
from features.store import FeatureStore

logger = logging.getLogger(__name__)
SHOWN = 5
SIDE = 168
QUALITY = 80


@dataclass(frozen=True)
class Candidate:
    """An item that a query found."""

    words: str
    cosine: float
    is_right: bool
    picture: str | None = None
    """Data URI; None for a caption, or where the image cannot be read."""


@dataclass(frozen=True)
class RetrievalExample:
    """A query and what it found."""

    words: str
    """The caption that was asked with, or what is written under the picture."""
    picture: str | None
    """The picture that was asked with."""
    rank: int
    """Place of the first right item, from 1."""
    gallery: int
    found: tuple[Candidate, ...]
    missed: Candidate | None = None
    """The right item, where it is not among those found."""

    @property
    def is_right(self) -> bool:
        """Whether a right item came first."""
        return self.rank == 1


@dataclass(frozen=True)
class ExamplePanel:
    """Examples of one task, drawn at random among the right and the wrong ones."""

    task: str
    dataset: str
    examples: tuple[RetrievalExample, ...]


@dataclass(frozen=True)
class Gallery:
    """The images and words of a split's rows, for showing."""

    store: FeatureStore
    index: Path
    max_pixels: int

    def picture(self, row: int) -> str | None:
        """Return a small picture of a row as a data URI, or None where it cannot be read.

        The shards may be gone since the features were computed; the numbers do not depend on them.
        """
        from features.images import ImageFault, decode  # torch comes with it

        if self._reader is None:
            return None
        try:
            data = self._reader.read_row(row)
            if data is None:
                return None
            return thumbnail(decode(data, max_pixels=self.max_pixels, upright=True))
        except (SourceError, ImageFault) as error:
            logger.warning("The report shows no picture of row %d: %s", row, error)
            return None

    def key(self, row: int) -> str:
        """Return the key of a row."""
        return str(self.store.keys(row, row + 1)[0])

    def caption(self, field: str, row: int) -> str:
        """Return one caption of a row."""
        return str(self.store.captions(field, row, row + 1)[0])

    @cached_property
    def _reader(self) -> Any:
        """The reader of the images, None where there is no index."""
        from features.index import Index, SampleReader

        if self.store.source.get("taken"):  # of what was imported there are none
            return None
        try:
            return SampleReader(Index.open(self.index), max_pixels=self.max_pixels)
        except SourceError as error:
            logger.warning("The report shows no pictures of %s: %s", self.index.stem, error)
            return None


@dataclass(frozen=True)
class ExampleQuery:
    """A query, and its cosine with everything there is."""

    words: str
    picture: str | None
    rank: int
    """Place of the first right item, from 1."""
    cosines: Float32[np.ndarray, "gallery"]
    right: Bool[np.ndarray, "gallery"]
    item: Callable[[int], tuple[str, str | None]]
    """Words and picture of an item."""


def draw(is_right: Bool[np.ndarray, "queries"], count: int, *, seed: int) -> list[int]:
    """Draw up to `count` right and as many wrong queries at random, the right ones first."""
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for group in (np.flatnonzero(is_right), np.flatnonzero(~is_right)):
        chosen += sorted(generator.choice(group, min(count, len(group)), replace=False).tolist())
    return chosen


def search_example(query: ExampleQuery) -> RetrievalExample:
    """Return what a query found first, and the nearest right item if that is further down.

    Of items that are equally near the wrong ones come first, as in the scores.
    """
    order = np.lexsort((query.right, -query.cosines.round(6)))
    found = tuple(_candidate(query, int(item)) for item in order[:SHOWN])
    missed = None
    if not any(candidate.is_right for candidate in found):
        missed = _candidate(query, int(order[query.right[order]][0]))
    return RetrievalExample(
        words=query.words,
        picture=query.picture,
        rank=query.rank,
        gallery=len(query.cosines),
        found=found,
        missed=missed,
    )


def _candidate(query: ExampleQuery, item: int) -> Candidate:
    words, picture = query.item(item)
    return Candidate(words, float(query.cosines[item]), bool(query.right[item]), picture)


def thumbnail(image: Image.Image, *, side: int = SIDE) -> str:
    """Return an image as a data URI, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
