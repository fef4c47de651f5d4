"""Which measures are taken on which splits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.config import EvalConfig
from features.errors import EvaluationError
from features.store import FeatureStore


@dataclass(frozen=True)
class Plan:
    """The splits of each measure."""

    retrieval: tuple[str, ...]
    zero_shot: tuple[str, ...]
    knn: tuple[str, ...]
    knn_reference: str
    compositional: tuple[str, ...]
    alignment: tuple[str, ...]
    segmentation: tuple[str, ...]
    """Not splits, but data sets with masks."""

    def uses_of(self, split: str) -> tuple[str, ...]:
        """Return, in words, what a split is used for."""
        uses = {
            "retrieval": self.retrieval,
            "zero-shot": self.zero_shot,
            "k-NN queries": self.knn,
            "k-NN reference": (self.knn_reference,) if self.knn else (),
            "compositional": self.compositional,
            "alignment": self.alignment,
        }
        return tuple(use for use, splits in uses.items() if split in splits)


def make_plan(
    config: EvalConfig, trained: Sequence[str], stores: Mapping[str, FeatureStore]
) -> Plan:
    """Take the splits that the settings name, or else all that have what a measure needs.

    Args:
        config: Settings.
        trained: The splits that the head was trained on; measured only if they are named. The first
            is the reference of k-NN if none is named.
        stores: All splits.

    Raises:
        EvaluationError: A split that is named lacks what the measure needs, or none has anything.
    """
    choice = _Choice(stores, [split for split in stores if split not in trained])
    plain = choice.without_groups()
    reference = config.knn_reference or trained[0]
    plan = Plan(
        retrieval=plain.of(config.retrieval, "retrieval", "captions", _has_captions),
        zero_shot=plain.of(
            config.zero_shot, "zero_shot", "labels with class names", _has_named_classes
        ),
        knn=_knn_splits(config, reference, plain),
        knn_reference=reference,
        compositional=choice.of(
            config.compositional, "compositional", "groups with captions", _has_groups
        ),
        alignment=plain.of(config.alignment, "alignment", "captions", _has_captions),
        segmentation=tuple(config.segmentation),
    )
    measured = (plan.retrieval, plan.zero_shot, plan.knn, plan.compositional, plan.segmentation)
    if not any(measured):
        others = f"only {', '.join(choice.others)}" if choice.others else "no split"
        raise EvaluationError(
            f"There is nothing to measure: beside {', '.join(map(repr, trained))}, on which the "
            f"head was trained, [data] has {others}. A split with captions, labels or groups was "
            f"expected. Add one of pictures kept from training, such as [data.test], or name "
            f"{trained[0]!r} in eval.retrieval."
        )
    return plan


@dataclass(frozen=True)
class _Choice:
    """Takes the splits that a setting names, or all that were not trained on and pass a test."""

    stores: Mapping[str, FeatureStore]
    others: list[str]

    def of(
        self, named: tuple[str, ...], setting: str, needs: str, test: Callable[[FeatureStore], bool]
    ) -> tuple[str, ...]:
        for split in named:
            if not test(self.stores[split]):
                raise EvaluationError(
                    f"eval.{setting} names {split!r}, but {self.stores[split].path} has no "
                    f"{needs}. A split that has them was expected. Take it out, or leave the "
                    f"setting empty."
                )
        return named or tuple(split for split in self.others if test(self.stores[split]))

    def without_groups(self) -> "_Choice":
        """Return the same choice, but of rows that were not made to be compared in groups."""
        plain = [split for split in self.others if self.stores[split].groups() is None]
        return _Choice(self.stores, plain)


def _knn_splits(config: EvalConfig, reference: str, choice: _Choice) -> tuple[str, ...]:
    voters = choice.stores[reference]
    if not is_labelled(voters):
        if not config.knn and config.knn_reference is None:
            return ()
        raise EvaluationError(
            f"The reference split of k-NN, {reference!r}, has no labels. A labelled split was "
            f"expected. Set eval.knn_reference, or leave eval.knn empty."
        )

    def can_be_voted_on(store: FeatureStore) -> bool:
        is_other = store.path != voters.path
        return is_other and is_labelled(store) and store.class_names == voters.class_names

    needs = f"labels of the same classes as {reference!r}, or is that split itself"
    return choice.of(config.knn, "knn", needs, can_be_voted_on)


def is_labelled(store: FeatureStore) -> bool:
    """Return whether any row of a store has a label."""
    labels = store.labels()
    return labels is not None and bool(np.any(labels >= 0))


def _has_named_classes(store: FeatureStore) -> bool:
    return is_labelled(store) and store.class_names is not None


def _has_groups(store: FeatureStore) -> bool:
    return store.groups() is not None and bool(store.fields)


def _has_captions(store: FeatureStore) -> bool:
    return bool(store.fields)
