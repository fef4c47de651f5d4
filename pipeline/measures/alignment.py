"""How alike image and text features of the same rows are, before and after the head."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int64

from evaluate.results import Result
from features.column import Column
from pipeline.embedding.rows import complete_column, feature_blocks, ok_rows
from pipeline.measures.alignment_values import alignment_values
from pipeline.measures.context import Context

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
    vectors: Callable[[Column, Int64[np.ndarray, "rows"]], Iterator[Float[np.ndarray, "_ dim"]]]


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
            vectors=feature_blocks,
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
            vectors=embedder.blocks,
        )
    )
    for pair in pairs:
        _score(context, split, pair)


def _score(context: Context, split: str, pair: _Pair) -> None:
    settings = context.config.eval
    both = np.intersect1d(ok_rows(pair.image), ok_rows(pair.text))
    held = min(len(both), settings.alignment_rows, settings.alignment_held)
    if held < max(LEAST_ROWS, 2 * settings.alignment_k + 2):
        context.findings.note(
            f"{pair.task} is left out: only {held} rows of {split} that have both an image and a "
            f"caption are compared, too few for k = {settings.alignment_k}."
        )
        return
    sides = [partial(pair.vectors, column) for column in (pair.image, pair.text)]
    for found in alignment_values(sides[0], sides[1], both, settings):
        context.findings.results.append(
            Result(
                task=pair.task,
                dataset=split,
                metric=found.name,
                value=found.calibrated.value,
                n=found.n,
                ci95=found.calibrated.interval,
                encoders=pair.encoders,
                protocol=found.protocol | {"vectors": pair.about, "captions": [pair.field]},
            )
        )
