"""What every measure reads, and where it puts what it found."""

import hashlib
import logging
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int64

from evaluate.bootstrap import Interval, ratio_interval
from evaluate.confusion import Confusions
from evaluate.items import Items
from evaluate.report import ExamplePanel, GroupExample
from evaluate.results import Result
from evaluate.segmentation_report import SegmentedPicture
from features.column import Column
from features.errors import EvaluationError
from features.store import FeatureStore
from pipeline.config import RunConfig
from pipeline.embedding import Embedder, ok_rows
from pipeline.run import RunFolder

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
        rows = ok_rows(column)
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
