"""How alike image and text features of the same rows are, before and after the head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int64

from evaluate.cka import LinearCka
from evaluate.mutual_knn import Cknna, MutualKnn, nearest_others
from evaluate.permutation import Measure, Prepare, calibrate
from evaluate.rbf_cka import RbfCka
from evaluate.results import Result
from evaluate.svcca import Svcca
from features.column import Column
from pipeline.embedding import complete_column, feature_blocks, ok_rows
from pipeline.measures.context import Context

DIMS = 10  # of SVCCA
LEAST_ROWS = 16
"""Halves of fewer rows say nothing."""


@dataclass(frozen=True)
class _Pair:
    """Two columns that are compared on rows that both have."""

    task: str
    about: str
    image: Column
    text: Column
    field: str
    encoders: dict[str, str | None]
    vectors: Callable[[Column, Int64[np.ndarray, "rows"]], Float[np.ndarray, "rows dim"]]


def score_alignment(context: Context, split: str) -> None:
    """Measure every image column against every text encoder, then the embeddings of the head.

    Of the caption fields the first one that retrieval searches is taken: one caption a row.
    """
    store, settings = context.stores[split], context.config.eval
    field = context.caption_fields(split, settings.retrieval_fields, "retrieval_fields")[0]
    encoders = context.config.encoders
    there = {name for name in store.columns() if not store.column(name).pending()}
    pairs = [
        _Pair(
            task=f"alignment/{image}|{text}/{field}",
            about="frozen features",
            image=complete_column(store, f"image/{image}"),
            text=complete_column(store, f"text/{text}/{field}"),
            field=field,
            encoders={"image": image, "text": text},
            vectors=lambda column, rows: np.concatenate(list(feature_blocks(column, rows))),
        )
        for image in encoders.image_columns
        for text in encoders.text
        if {f"image/{image}", f"text/{text}/{field}"} <= there
    ]
    embedder = context.embedder
    pairs.append(
        _Pair(
            task="alignment/embeddings",
            about="aligned embeddings",
            image=embedder.image_column(store),
            text=embedder.text_column(store, field),
            field=field,
            encoders=context.encoders,
            vectors=lambda column, rows: np.concatenate(list(embedder.blocks(column, rows))),
        )
    )
    for pair in pairs:
        _score(context, split, pair)


def _score(context: Context, split: str, pair: _Pair) -> None:
    settings = context.config.eval
    both = np.intersect1d(ok_rows(pair.image), ok_rows(pair.text))
    if len(both) < max(LEAST_ROWS, 2 * settings.alignment_k + 2):
        context.findings.note(
            f"{pair.task} is left out: only {len(both)} rows of {split} have both an image and a "
            f"caption, too few for k = {settings.alignment_k}."
        )
        return
    generator = np.random.default_rng(settings.seed)
    number = min(settings.alignment_rows, len(both))
    rows = np.sort(generator.choice(both, number, replace=False))
    features = pair.vectors(pair.image, rows), pair.vectors(pair.text, rows)
    for name in settings.alignment_measures:
        prepare, about = _measure(name, settings.alignment_k)
        found = calibrate(
            prepare,
            features,
            permutations=settings.alignment_permutations,
            subsamples=settings.alignment_subsamples,
            seed=settings.seed,
        )
        context.findings.results.append(
            Result(
                task=pair.task,
                dataset=split,
                metric=name,
                value=found.value,
                n=number,
                ci95=found.interval,
                encoders=pair.encoders,
                protocol=about
                | {
                    "vectors": pair.about,
                    "captions": [pair.field],
                    "rows": f"{number} of {len(both)}, drawn with seed {settings.seed}",
                    "interval": f"{settings.alignment_subsamples} halves of the rows",
                    "permutations": settings.alignment_permutations,
                    "chance": found.null_mean,
                    "calibrated": found.calibrated,
                    "p_value": found.p_value,
                },
            )
        )


def _measure(name: str, k: int) -> tuple[Prepare, dict[str, object]]:
    """Return a measure by its name, and what could change it."""
    neighbours: dict[str, object] = {"k": k, "similarity": "cosine"}
    known: dict[str, tuple[Prepare, dict[str, object]]] = {
        "cka": (LinearCka, {"kernel": "linear"}),
        "cka_debiased": (partial(LinearCka, debiased=True), {"kernel": "linear"}),
        "cka_rbf": (RbfCka, {"kernel": "RBF, σ the median distance"}),
        "mutual_knn": (partial(_of_neighbours, MutualKnn, k), neighbours),
        "cknna": (partial(_of_neighbours, Cknna, k), neighbours),
        "svcca": (partial(Svcca, dims=DIMS), {"dims": DIMS}),
    }
    return known[name]


def _of_neighbours(
    measure: type[MutualKnn] | type[Cknna],
    k: int,
    first: Float[np.ndarray, "rows first_dim"],
    second: Float[np.ndarray, "rows second_dim"],
) -> Measure:
    return measure(nearest_others(first, k), nearest_others(second, k))
