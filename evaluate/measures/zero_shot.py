"""Zero-shot classification of a labelled split."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from evaluate.examples import Gallery, Search, draw, search_example
from evaluate.measures.context import TIES, Context
from evaluate.report import Confusions, ExamplePanel
from evaluate.results import Items, Result
from evaluate.statistics import mean_per_class_interval
from evaluate.zero_shot import Classified, classify, confusion_matrix, read_templates
from features.store import FeatureStore

TOP = 5


@dataclass(frozen=True)
class Scored:
    """The labelled images of a split, classified."""

    rows: Int64[np.ndarray, "images"]
    """Rows of the store."""
    images: Float[Tensor, "images dim"]
    classes: Float[Tensor, "classes dim"]
    found: Classified


def classify_split(context: Context, split: str) -> Scored:
    """Classify all labelled images of a split by the prompts of its classes."""
    store, embedder = context.stores[split], context.embedder
    names, templates = store.class_names or (), _templates(context, split)
    images = embedder.images(store)
    rows, labels = context.labelled_rows(split, embedder.image_column(store))
    places = torch.from_numpy(np.searchsorted(images.rows, rows)).to(embedder.device)
    classes = context.class_embeddings(names, templates)
    vectors = images.vectors[places]
    return Scored(rows, vectors, classes, classify(vectors, classes, labels))


def score_zero_shot(context: Context, split: str) -> None:
    """Score all images, and apart those of classes that training had no row of."""
    store, scored = context.stores[split], classify_split(context, split)
    rows, found, names = scored.rows, scored.found, store.class_names or ()
    _add_results(context, split, rows, found)
    seen = _seen_classes(context, store)
    labels = found.labels
    if seen is not None and 0 < seen[labels].sum() < len(labels):
        for part, chosen in (("seen", seen[labels]), ("unseen", ~seen[labels])):
            _add_results(context, f"{split}/{part} classes", rows[chosen], found.select(chosen))
    matrix = confusion_matrix(labels, found.predicted, len(names))
    context.findings.confusions.append(Confusions(split, names, matrix))
    _add_examples(context, split, rows, scored.images @ scored.classes.T, found)


def _templates(context: Context, split: str) -> tuple[str, ...]:
    settings = context.config.eval
    return read_templates(settings.split_templates.get(split, settings.templates))


def _add_results(
    context: Context, dataset: str, rows: Int64[np.ndarray, "images"], found: Classified
) -> None:
    settings = context.config.eval
    split = dataset.partition("/")[0]
    num_classes = len(context.stores[split].class_names or ())
    right = (found.ranks < 1).astype(np.int64)
    measured = {"top1": Items(right)}
    if num_classes > TOP:
        measured["top5"] = Items((found.ranks < TOP).astype(np.int64))
    measured["mean_per_class"] = Items(right, classes=found.labels)
    intervals = {name: context.interval(items.hits) for name, items in measured.items()}
    intervals["mean_per_class"] = mean_per_class_interval(
        found.labels, found.ranks == 0, resamples=settings.bootstrap, seed=settings.seed
    )
    for metric, items in measured.items():
        mean = metric == "mean_per_class"
        result = Result(
            task="zero_shot",
            dataset=dataset,
            metric=metric,
            value=found.mean_per_class() if mean else float(items.hits.mean()),
            n=len(found.labels),
            ci95=intervals[metric],
            encoders=context.encoders,
            protocol={
                "templates": list(_templates(context, split)),
                "classes": num_classes,
                "ties": TIES,
                "chance": round((TOP if metric == "top5" else 1) / num_classes, 8),
            },
        )
        context.add(result, rows, items)


def _seen_classes(context: Context, store: FeatureStore) -> Bool[np.ndarray, "classes"] | None:
    """Return which classes were trained on, by name; None if a training split has no labels."""
    seen = set[str]()
    for split in context.config.trained_splits:
        labels, names = context.stores[split].labels(), context.stores[split].class_names
        if labels is None or names is None:
            return None
        seen |= {names[label] for label in np.unique(labels[labels >= 0])}
    return np.array([name in seen for name in store.class_names or ()])


def _add_examples(
    context: Context,
    split: str,
    rows: Int64[np.ndarray, "images"],
    cosines: Float[Tensor, "images classes"],
    found: Classified,
) -> None:
    settings, store = context.config.eval, context.stores[split]
    gallery = Gallery(context.config, context.folder, store, split)
    names = store.class_names or ()

    def classes_for(image: int) -> Search:
        label = int(found.labels[image])
        return Search(
            words=names[label],
            picture=gallery.picture(int(rows[image])),
            rank=int(found.ranks[image]) + 1,
            cosines=cosines[image].cpu().numpy(),
            right=np.arange(len(names)) == label,
            item=lambda number: (names[number], None),
        )

    chosen = draw(found.ranks == 0, settings.examples, seed=settings.seed)
    examples = tuple(search_example(classes_for(image)) for image in chosen)
    context.findings.panels.append(ExamplePanel("zero_shot", split, examples))
