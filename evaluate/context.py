"""A run that is measured: what every measure reads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from evaluate.classification import class_embeddings
from evaluate.config import EvalSettings
from evaluate.embedder import ROWS_AT_ONCE, Embedder, prompt_features
from evaluate.examples import Gallery
from evaluate.results import Findings, Items, Result
from evaluate.statistics import Interval, interval_of, value_of
from features.config import TextEncoderConfig
from features.encoders.image import ImageColumn, ImageEncoder
from features.errors import EvaluationError, UnusableSplitError
from features.storage.column import Column
from features.store import FeatureStore

Made = TypeVar("Made")


@runtime_checkable
class Progress(Protocol):
    """A line that tells how much is done."""

    def advance(self, count: int) -> None:
        """Add to what is done."""


@dataclass(frozen=True)
class Context:
    """A run: its settings, stores and head, and the ways to its encoders and pictures."""

    settings: EvalSettings
    trained: tuple[str, ...]
    """The splits that the head was trained on."""
    stores: Mapping[str, FeatureStore]
    embedder: Embedder
    image_columns: Sequence[str]
    """All image columns of the recipe, also those that the head was not trained on."""
    text_encoders: Mapping[str, TextEncoderConfig]
    image_encoder: Callable[[], tuple[ImageEncoder, ImageColumn]]
    """Loads the encoder of the head's images, and says which of its columns that is."""
    index: Callable[[str], Path]
    """Of a split: the index by which its pictures are found."""
    max_pixels: int
    """Width times height of a picture that is still decoded."""
    prompts: Path
    """Folder that keeps the features of prompts."""
    inputs: Mapping[str, Mapping[str, Any]]
    """What each measure opened beside the stores, by its name."""
    check_stop: Callable[[], None]
    """Raises where a signal asked the run to stop; called between pictures or batches."""
    progress: Callable[[str, int, str], AbstractContextManager[Progress]]
    """Shows a line with a name, how much there is to do, and in what unit."""
    _made: dict[object, Any] = field(default_factory=dict)

    @property
    def encoders(self) -> dict[str, str | None]:
        """The encoders that the head was trained on."""
        return {"image": self.embedder.image, "text": self.embedder.text}

    def gallery(self, split: str) -> Gallery:
        """Return the pictures and words of the rows of a split."""
        return Gallery(self.stores[split], self.index(split), self.max_pixels)

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """Return what was made for a key, made at the first call: what several splits share."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def class_embeddings(self, prompts: Sequence[Sequence[str]]) -> Float[Tensor, "classes dim"]:
        """Embed classes, each by the mean of its prompts; so many at once as rows of a store.

        Raises:
            EvaluationError: The text encoder is not the one that the head was trained on.
        """
        texts = [text for each in prompts for text in each]
        features = prompt_features(self.text_encoders, self.embedder, texts, self.prompts)
        counts = list(map(len, prompts))
        step, start = max(1, ROWS_AT_ONCE // max(counts)), 0
        found = []
        for first in range(0, len(counts), step):
            some = counts[first : first + step]
            stop = start + sum(some)
            embedded = self.embedder.apply(self.embedder.model.embed_text, features[start:stop])
            found += [class_embeddings(each[None]) for each in embedded.split_with_sizes(some)]
            start = stop
        return torch.cat(found)

    def interval(self, items: Items) -> Interval | None:
        """Return the bootstrap interval of what items sum up to, as the settings ask for it."""
        return interval_of(items, resamples=self.settings.bootstrap, seed=self.settings.seed)

    def add(self, found: Findings, items: Items, **about: Any) -> None:
        """Keep the number that items sum up to, with its interval.

        Args:
            found: Where it is kept.
            items: What each item scored.
            about: `task`, `dataset`, `metric` and `protocol` of the result; also `encoders`, where
                these are not those of the head.
        """
        result = Result(
            value=value_of(items),
            n=len(items.hits),
            ci95=self.interval(items),
            **{"encoders": self.encoders} | about,
        )
        store = self.stores.get(result.split)
        found.add(result, items, store.keys_sha256 if store else "")

    def labelled_rows(
        self, split: str, column: Column
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """Return the rows of a column that are ok and have a label, and their labels.

        Raises:
            EvaluationError: There are none.
        """
        labels = self.stores[split].labels()
        rows = column.ok_rows()
        if labels is not None:
            rows = rows[labels[rows] >= 0]
        if labels is None or not len(rows):
            raise UnusableSplitError(
                f"{self.stores[split].path}/{column.name} has no row that is ok and has a label. "
                f"At least one was expected. See why with `sail inspect "
                f"{self.stores[split].path}`, or name other splits in [eval]."
            )
        return rows, labels[rows].astype(np.int64)

    def caption_fields(self, split: str, named: Iterable[str], setting: str) -> tuple[str, ...]:
        """Return the caption fields of a split that a setting names, or all.

        Raises:
            EvaluationError: The split has no such field.
        """
        store, fields = self.stores[split], tuple(named)
        if unknown := sorted(set(fields) - set(store.fields)):
            raise EvaluationError(
                f"eval.{setting} names {unknown}, but {store.path} has the caption fields "
                f"{list(store.fields)}. Names among these were expected. Correct the setting."
            )
        return fields or store.fields
