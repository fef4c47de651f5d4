"""What a measure is: one object that says what it needs, measures a split, and explains itself.

A new measure is a file with a subclass of `Measure` and its line in `evaluate.measures.MEASURES`.
From that follow its settings in the run file, the splits it runs on, results.json, the sections of
the report and of `sail explore`, and the generated pages of the documentation.

These files are imported to read a run file, so they must not import torch at their top: import what
needs it where it is used, and take `Context` and `Tensor` for annotations from here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel

from evaluate.config import EvalSettings
from evaluate.results import Findings, Result
from features.errors import EvaluationError
from features.store import FeatureStore

if TYPE_CHECKING:
    from torch import Tensor

    from evaluate.context import Context
else:
    Context = Tensor = Any

TIES = "count against the score (cosines within 1e-6)"
__all__ = ["TIES", "Context", "Headline", "Inputs", "Measure", "Splits", "Tensor"]


@dataclass(frozen=True)
class Splits:
    """The splits of a run, from which a measure takes its own."""

    stores: Mapping[str, FeatureStore]
    trained: tuple[str, ...]
    """Those that the head was trained on: measured only where the settings name them."""

    def choose(
        self,
        setting: str,
        named: Sequence[str],
        needs: str,
        test: Callable[[FeatureStore], bool],
        *,
        of_groups: bool = False,
    ) -> tuple[str, ...]:
        """Return the splits that a setting names, or all others that have what is needed.

        Args:
            setting: Its name, for the message.
            named: Its value.
            needs: What the test asks for, in words.
            test: Whether a split has it.
            of_groups: Whether splits with groups are taken too, where none is named.

        Raises:
            EvaluationError: A split that is named lacks what is needed.
        """
        for split in named:
            if not test(self.stores[split]):
                raise EvaluationError(
                    f"{setting} names {split!r}, but {self.stores[split].path} has no {needs}. A "
                    f"split that has them was expected. Take it out, or leave the setting empty."
                )
        others = (
            name
            for name, store in self.stores.items()
            if name not in self.trained and (of_groups or store.groups() is None) and test(store)
        )
        return tuple(named) or tuple(others)


@runtime_checkable
class Inputs(Protocol):
    """Data that a measure reads beside the stores."""

    def version(self) -> object:
        """Return plain data that change when they do."""


@dataclass(frozen=True)
class Headline:
    """A number at the top of the report."""

    title: str
    in_short: str
    result: Result


class Measure(ABC):
    """A measure: its settings, what it needs, how it is taken, and how it is explained."""

    name: ClassVar[str]
    """Its tasks in results.json are `NAME` or `NAME/…`; the setting `eval.NAME` has its splits."""
    title: ClassVar[str]
    in_short: ClassVar[str]
    """What is asked, in a line without a full stop: under the headline, and on the page."""
    explained: ClassVar[str]
    """A paragraph for a reader who does not know it, with **bold** for what the columns are."""
    method: ClassVar[str] = ""
    """How it is computed, for the end of the report."""
    metric: ClassVar[str]
    """The primary metric: the number to look at first."""
    greater_is_better: ClassVar[bool] = True
    has_headline: ClassVar[bool] = True
    """Whether its primary metric stands at the top of the report."""
    in_percent: ClassVar[bool] = True
    """Whether values are shown in per cent, rather than as they are."""
    settings: ClassVar[type[EvalSettings]]
    sections: ClassVar[Mapping[str, type[BaseModel]]] = {}
    """Sections of the run file below `eval`, by the heading that the documentation gives them."""
    needs: ClassVar[str] = "captions"
    """What a split must have, in words."""
    is_of_head: ClassVar[bool] = True
    """Whether it says something of the head, as it does not of the data alone."""
    of_groups: ClassVar[bool] = False
    """Whether rows are compared in groups; the other measures leave splits with groups out."""
    template: ClassVar[str] = "results.html.j2"
    """Part of the report, in `evaluate/templates`; this one is a table of the numbers."""

    def can_measure(self, store: FeatureStore) -> bool:
        """Return whether a split has what is needed."""
        return bool(store.fields)

    def mentions(self, settings: EvalSettings) -> dict[str, Sequence[str]]:
        """Return the splits of [data] that its settings name, by the name of the setting."""
        return {f"eval.{self.name}": getattr(settings, self.name)}

    def splits(self, settings: EvalSettings, splits: Splits) -> tuple[str, ...]:
        """Return what it is taken on: splits of the run, or the names of its own `inputs`.

        Raises:
            EvaluationError: A split that the settings name lacks what is needed.
        """
        setting = f"eval.{self.name}"
        named = self.mentions(settings)[setting]
        return splits.choose(setting, named, self.needs, self.can_measure, of_groups=self.of_groups)

    def uses(self, settings: EvalSettings, splits: Splits) -> dict[str, tuple[str, ...]]:
        """Return what splits are used for, in words: the splits by their use."""
        return {self.title[0].lower() + self.title[1:]: self.splits(settings, splits)}

    def inputs(self, settings: EvalSettings, max_pixels: int) -> Mapping[str, Inputs]:  # noqa: ARG002
        """Open, by name, what is read beside the stores; called before anything is computed.

        Args:
            settings: The section `eval`.
            max_pixels: Width times height of a picture that is still decoded.
        """
        return {}

    @abstractmethod
    def run(self, context: Context, split: str) -> Findings:
        """Measure a split.

        Raises:
            EvaluationError: It cannot be measured.
        """

    def variant(self, result: Result) -> str:  # noqa: ARG002
        """Return what tells results of one task and metric apart; empty where there is one."""
        return ""

    def label(self, result: Result) -> str:
        """Return what was measured, for a table of this measure alone."""
        detail = result.task[len(self.name) + 1 :].replace("_", " ")
        return ", ".join(filter(None, [result.metric.replace("_", " "), detail]))

    def headlines(self, results: Sequence[Result]) -> list[Headline]:
        """Return the numbers at the top of the report: here the first of the primary metric."""
        found = [each for each in results if self.has_headline and each.metric == self.metric]
        return [Headline(self.title, self.in_short, each) for each in found[:1]]

    def view(self, results: Sequence[Result], exhibits: Sequence[Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return what the template needs beside `results` and `exhibits`."""
        return {}

    def owns(self, result: Result) -> bool:
        """Return whether a result is of this measure."""
        return result.task.partition("/")[0] == self.name


def is_labelled(store: FeatureStore) -> bool:
    """Return whether any row of a store has a label."""
    labels = store.labels()
    return labels is not None and bool(np.any(labels >= 0))
