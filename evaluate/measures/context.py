"""What every measure reads, and where it puts what it found."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from evaluate.embedder import ROWS_AT_ONCE, Embedder, prompt_features
from evaluate.report import Confusions, ExamplePanel, GroupExample, SegmentedPicture
from evaluate.results import Items, Result
from evaluate.statistics import Interval, ratio_interval
from evaluate.zero_shot import class_embeddings, make_prompts
from features.errors import EvaluationError
from features.storage.column import Column
from features.store import FeatureStore
from pipeline.run.aligned import Aligned
from pipeline.run.config import RunConfig
from pipeline.run.folder import RunFolder

logger = logging.getLogger(__name__)
TIES = "count against the score (cosines within 1e-6)"


@dataclass
class Findings:
    """The numbers, and what the report shows beside them."""

    results: list[Result] = field(default_factory=list)
    items: dict[str, Items] = field(default_factory=dict)
    """Of the results, by name, that are sums over items: what each item scored."""
    panels: list[ExamplePanel] = field(default_factory=list)
    groups: list[GroupExample] = field(default_factory=list)
    confusions: list[Confusions] = field(default_factory=list)
    segmented: list[SegmentedPicture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something in the log and in the report."""
        logger.info("%s", text)
        self.notes.append(text)


@dataclass(frozen=True)
class Context:
    """A run that is measured."""

    config: RunConfig
    folder: RunFolder
    stores: dict[str, FeatureStore]
    embedder: Embedder
    findings: Findings

    @property
    def encoders(self) -> dict[str, str | None]:
        """The encoders that the head was trained on."""
        return {"image": self.embedder.image, "text": self.embedder.text}

    @cached_property
    def aligned(self) -> Aligned:
        """The encoders behind the head, each loaded when it is first used."""
        embedder = self.embedder
        return Aligned.of_run(self.config, embedder.checkpoint, embedder.model, embedder.device)

    def class_embeddings(
        self, names: Sequence[str], templates: Sequence[str]
    ) -> Float[Tensor, "names dim"]:
        """Embed names by the mean of their prompts, so many at once as rows of a store.

        Raises:
            EvaluationError: A template has no place for the name, or the text encoder is another.
        """
        prompts = make_prompts(names, templates)
        features = prompt_features(self.config, self.embedder, prompts, self.folder.eval)
        step = max(1, ROWS_AT_ONCE // len(templates)) * len(templates)
        embed = self.embedder.model.embed_text
        parts = [
            self.embedder.apply(embed, features[start : start + step])
            for start in range(0, len(features), step)
        ]
        shape = (len(templates), parts[0].shape[-1])
        return torch.cat([class_embeddings(part.view(-1, *shape)) for part in parts])

    def interval(
        self, hits: Int64[np.ndarray, "items"], counts: Int64[np.ndarray, "items"] | None = None
    ) -> Interval | None:
        """Return the bootstrap interval of Σ hits / Σ counts, as the settings ask for it."""
        settings = self.config.eval
        return ratio_interval(hits, counts, resamples=settings.bootstrap, seed=settings.seed)

    def add(self, result: Result, rows: Int64[np.ndarray, "used"], items: Items) -> None:
        """Keep a number together with what each item scored and of which rows the items are."""
        digest = hashlib.sha256(self.stores[result.split].keys_sha256.encode())
        digest.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
        protocol = result.protocol | {"rows_sha256": digest.hexdigest()}
        self.findings.results.append(replace(result, protocol=protocol))
        self.findings.items[result.name] = items

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
            raise EvaluationError(
                f"{self.stores[split].path}/{column.name} has no row that is ok and has a label. "
                f"At least one was expected. See why with `sail inspect "
                f"{self.stores[split].path}`, or name other splits in [eval]."
            )
        return rows, labels[rows].astype(np.int64)

    def caption_fields(self, split: str, named: tuple[str, ...], setting: str) -> tuple[str, ...]:
        """Return the caption fields of a split that a setting names, or all.

        Raises:
            EvaluationError: The split has no such field.
        """
        store = self.stores[split]
        if unknown := sorted(set(named) - set(store.fields)):
            raise EvaluationError(
                f"eval.{setting} names {unknown}, but {store.path} has the caption fields "
                f"{list(store.fields)}. Names among these were expected. Correct the setting."
            )
        return named or store.fields
