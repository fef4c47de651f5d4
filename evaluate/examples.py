"""Examples for the report: which ones, what they found, and their pictures."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32

from evaluate.charts import thumbnail
from evaluate.report import Candidate, RetrievalExample
from features.errors import SourceError
from features.images import ImageFault, decode
from features.index import Index, SampleReader
from features.store import FeatureStore
from pipeline.run.config import RunConfig
from pipeline.run.folder import RunFolder

logger = logging.getLogger(__name__)
SHOWN = 5


@dataclass(frozen=True)
class Gallery:
    """The images and words of a split's rows, for showing."""

    config: RunConfig
    folder: RunFolder
    store: FeatureStore
    split: str

    def picture(self, row: int) -> str | None:
        """Return a small picture of a row as a data URI, or None where it cannot be read.

        The shards may be gone since the features were computed; the numbers do not depend on them.
        """
        if self._reader is None:
            return None
        try:
            data = self._reader.read_row(row)
            if data is None:
                return None
            max_pixels = self.config.extract.max_pixels
            return thumbnail(decode(data, max_pixels=max_pixels, upright=True))
        except (SourceError, ImageFault) as error:
            logger.warning(
                "The report shows no picture of row %d of %s: %s", row, self.split, error
            )
            return None

    def key(self, row: int) -> str:
        """Return the key of a row."""
        return str(self.store.keys(row, row + 1)[0])

    def caption(self, field: str, row: int) -> str:
        """Return one caption of a row."""
        return str(self.store.captions(field, row, row + 1)[0])

    @cached_property
    def _reader(self) -> SampleReader | None:
        try:
            index = Index.open(self.folder.index(self.split))
            return SampleReader(index, max_pixels=self.config.extract.max_pixels)
        except SourceError as error:
            logger.warning("The report shows no picture of %s: %s", self.split, error)
            return None


@dataclass(frozen=True)
class Search:
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


def search_example(search: Search) -> RetrievalExample:
    """Return what a query found first, and the nearest right item if that is further down.

    Of items that are equally near the wrong ones come first, as in the scores.
    """
    order = np.lexsort((search.right, -search.cosines.round(6)))
    found = tuple(_candidate(search, int(item)) for item in order[:SHOWN])
    missed = None
    if not any(candidate.is_right for candidate in found):
        missed = _candidate(search, int(order[search.right[order]][0]))
    return RetrievalExample(
        words=search.words,
        picture=search.picture,
        rank=search.rank,
        gallery=len(search.cosines),
        found=found,
        missed=missed,
    )


def _candidate(search: Search, item: int) -> Candidate:
    words, picture = search.item(item)
    return Candidate(words, float(search.cosines[item]), bool(search.right[item]), picture)
