"""Zero-shot classification of a labelled split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from pydantic import Field

from evaluate.config import EvalSettings, Names
from evaluate.confusion import Confusions, confusion_matrix, confusion_view
from evaluate.examples import ExamplePanel, ExampleQuery, draw, search_example
from evaluate.measures.measure import TIES, Context, Inputs, Measure, Tensor, is_labelled
from evaluate.prompts import is_of_classes, read_prompts, read_templates
from evaluate.results import Findings, Items, Result, sha256_of
from features.class_lists import CLASS_LISTS
from features.config import Templates
from features.store import FeatureStore

TOP = 5


class ZeroShotSettings(EvalSettings):
    """Settings of zero-shot classification."""

    zero_shot: Names = ()
    """Splits for zero-shot classification; every labelled split but the training split and those
    with groups, if empty."""
    templates: Templates = ("a photo of a {}.",)
    """Prompts for a class name; their embeddings are averaged. A list, the name of a data set whose
    prompts ship with the program (`imagenet-1k`: the 80 of CLIP; docs/datasets.md has all), a JSON
    file `{"templates": […]}`, or one with prompts for each class by its name, as CuPL's."""
    split_templates: dict[str, Templates] = Field(default={})
    """Prompts for splits that have their own, in the same forms."""

    def templates_of(self, split: str) -> tuple[str, ...] | str:
        """Return the prompts of a split."""
        return self.split_templates.get(split, self.templates)


class ZeroShot(Measure):
    """Accuracy of the class whose prompts are nearest."""

    name = "zero_shot"
    title = "Zero-shot classification"
    in_short = "A picture's class, picked from all class names without a labelled example"
    explained = (
        "Every class name is put into a few sentences, which the text side embeds; a picture gets "
        "the class whose sentences are nearest. This step sees no labelled picture. **top5** asks "
        "whether the class is among the five nearest; **mean per class** counts rare classes like "
        "frequent ones."
    )
    method = (
        "Each prompt is embedded and normalised, the mean over the templates is normalised again "
        "(CLIP’s prompt ensembling)."
    )
    metric = "top1"
    settings = ZeroShotSettings
    needs = "labels with class names"
    template = "zero_shot.html.j2"

    def can_measure(self, store: FeatureStore) -> bool:
        """Return whether there are labels with names."""
        return is_labelled(store) and store.class_names is not None

    def mentions(self, settings: EvalSettings) -> dict[str, Sequence[str]]:
        """Return also the splits that have prompts of their own."""
        of_splits = tuple(settings.of(ZeroShotSettings).split_templates)
        return super().mentions(settings) | {"eval.split_templates": of_splits}

    def inputs(self, settings: EvalSettings, max_pixels: int) -> Mapping[str, Inputs]:  # noqa: ARG002
        """Return the files of templates, so that a changed one is measured again."""
        own = settings.of(ZeroShotSettings)
        named = {"": own.templates} | own.split_templates
        return {
            split: _PromptFile(Path(each))
            for split, each in named.items()
            if isinstance(each, str) and each not in CLASS_LISTS
        }

    def run(self, context: Context, split: str) -> Findings:
        """Score all images, and apart those of classes that training had no row of."""
        from evaluate.classification import classify

        store, embedder, found = context.stores[split], context.embedder, Findings()
        names = store.class_names or ()
        rows, labels = context.labelled_rows(split, embedder.image_column(store))
        images = embedder.images(store).at(rows)
        settings = context.settings.of(ZeroShotSettings)
        classes = context.class_embeddings(read_prompts(settings.templates_of(split), names))
        classified = classify(images, classes, labels)
        _add_results(context, found, split, rows, classified)
        seen = _seen_classes(context, store)
        if seen is not None and 0 < seen[labels].sum() < len(labels):
            for part, chosen in (("seen", seen[labels]), ("unseen", ~seen[labels])):
                dataset = f"{split}/{part} classes"
                _add_results(context, found, dataset, rows[chosen], classified.select(chosen))
        matrix = confusion_matrix(labels, classified.predicted, len(names))
        found.exhibits.append(Confusions(split, names, matrix))
        found.exhibits.append(_examples(context, split, rows, images @ classes.T, classified))
        return found

    def view(self, results: Sequence[Result], exhibits: Sequence[Any]) -> dict[str, Any]:
        """Return the examples, the confusion matrices, and whether some classes were not seen."""
        matrices = [each for each in exhibits if isinstance(each, Confusions)]
        return {
            "panels": [each for each in exhibits if isinstance(each, ExamplePanel)],
            "confusions": [confusion_view(each) for each in matrices],
            "has_unseen": any(each.dataset.endswith("/unseen classes") for each in results),
        }


@dataclass(frozen=True)
class _PromptFile:
    """A file of templates or prompts."""

    path: Path

    def version(self) -> object:
        """Return the hash of the file."""
        return sha256_of(self.path)


def prompts_protocol(settings: ZeroShotSettings, split: str) -> list[str]:
    """Return what a protocol says of the prompts: the templates, or the file with those of each."""
    setting = settings.templates_of(split)
    if not is_of_classes(setting):
        return list(read_templates(setting))
    path = Path(str(setting))
    return [f"those of each class in {path.name}, sha256 {sha256_of(path)}"]


def _add_results(
    context: Context,
    found: Findings,
    dataset: str,
    rows: Int64[np.ndarray, "images"],
    classified: Any,
) -> None:
    split = dataset.partition("/")[0]
    num_classes = len(context.stores[split].class_names or ())
    right = (classified.ranks < 1).astype(np.int64)
    each = rows[:, None]
    measured = {"top1": Items(right, taken=classified.predicted, rows=each)}
    if num_classes > TOP:
        measured["top5"] = Items((classified.ranks < TOP).astype(np.int64), rows=each)
    measured["mean_per_class"] = Items(right, classes=classified.labels, rows=each)
    for metric, items in measured.items():
        context.add(
            found,
            items,
            task="zero_shot",
            dataset=dataset,
            metric=metric,
            protocol={
                "templates": prompts_protocol(context.settings.of(ZeroShotSettings), split),
                "classes": num_classes,
                "ties": TIES,
                "chance": round((TOP if metric == "top5" else 1) / num_classes, 8),
            },
        )


def _seen_classes(context: Context, store: FeatureStore) -> Bool[np.ndarray, "classes"] | None:
    """Return which classes were trained on, by name; None if a training split has no labels."""
    seen = set[str]()
    for split in context.trained:
        labels, names = context.stores[split].labels(), context.stores[split].class_names
        if labels is None or names is None:
            return None
        seen |= {names[label] for label in np.unique(labels[labels >= 0])}
    return np.array([name in seen for name in store.class_names or ()])


def _examples(
    context: Context,
    split: str,
    rows: Int64[np.ndarray, "images"],
    cosines: Float[Tensor, "images classes"],
    classified: Any,
) -> ExamplePanel:
    settings, gallery = context.settings, context.gallery(split)
    names = context.stores[split].class_names or ()

    def classes_for(image: int) -> ExampleQuery:
        label = int(classified.labels[image])
        return ExampleQuery(
            words=names[label],
            picture=gallery.picture(int(rows[image])),
            rank=int(classified.ranks[image]) + 1,
            cosines=cosines[image].cpu().numpy(),
            right=np.arange(len(names)) == label,
            item=lambda number: (names[number], None),
        )

    chosen = draw(classified.ranks == 0, settings.examples, seed=settings.seed)
    return ExamplePanel("zero_shot", split, tuple(search_example(classes_for(i)) for i in chosen))
