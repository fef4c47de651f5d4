"""k-NN classification of a labelled split by the rows of another."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from evaluate.config import EvalConfig
from evaluate.embedder import complete_column
from evaluate.measures.context import Context
from evaluate.nearest import (
    LEAST_ROWS,
    Neighbours,
    approximate_neighbours,
    flat_search,
    nearest_neighbours,
    vote,
)
from evaluate.results import Items, Result
from features.storage.column import Column

logger = logging.getLogger(__name__)
Vectors = Callable[[Column, Int64[np.ndarray, "rows"]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class _Search:
    """Which vectors ask, which answer, and what they are."""

    kind: str
    encoders: dict[str, str | None]
    query: Column
    voters: Sequence[Column]
    vectors: Vectors
    about: str


def score_knn(context: Context, split: str, reference: str) -> None:
    """Score the features of every image encoder, the embeddings, and images against captions."""
    queries, voters = context.stores[split], context.stores[reference]
    for name in context.config.encoders.image_columns:
        columns = [complete_column(store, f"image/{name}") for store in (queries, voters)]
        encoders: dict[str, str | None] = {"image": name, "text": None}
        about = "frozen features, not centred"
        search = _Search("image_features", encoders, columns[0], columns[1:], Column.blocks, about)
        _score(context, split, reference, search)
    embedder = context.embedder
    query, voter = embedder.image_column(queries), embedder.image_column(voters)
    about = "aligned image embeddings"
    _score(
        context,
        split,
        reference,
        _Search("image_embeddings", context.encoders, query, [voter], embedder.blocks, about),
    )
    if voters.fields:
        texts = [embedder.text_column(voters, name) for name in voters.fields]
        about = f"aligned images against the captions {', '.join(voters.fields)} of the reference"
        _score(
            context,
            split,
            reference,
            _Search("cross_modal", context.encoders, query, texts, embedder.blocks, about),
        )


def _score(context: Context, split: str, reference: str, search: _Search) -> None:
    settings = context.config.eval
    rows, labels = context.labelled_rows(split, search.query)
    voters = [(column, *context.labelled_rows(reference, column)) for column in search.voters]
    voter_labels = np.concatenate([voted for _, _, voted in voters])
    ks = [k for k in settings.knn_k if k <= len(voter_labels)]
    if dropped := sorted(set(settings.knn_k) - set(ks)):
        context.findings.note(
            f"k-NN with k = {', '.join(map(str, dropped))} is left out: {reference} has only "
            f"{len(voter_labels)} rows that can vote."
        )
    if not ks:
        return
    neighbours, about = find_neighbours(
        settings,
        np.concatenate(list(search.vectors(search.query, rows))),
        lambda: (block for column, chosen, _ in voters for block in search.vectors(column, chosen)),
        len(voter_labels),
        max(ks),
    )
    num_classes = int(max(labels.max(), voter_labels.max())) + 1
    num_classes = max(num_classes, len(context.stores[split].class_names or ()))
    for k in ks:
        predicted = vote(
            neighbours,
            voter_labels,
            k=k,
            temperature=settings.knn_temperature,
            num_classes=num_classes,
        )
        hits = (predicted == labels).astype(np.int64)
        context.add(
            Result(
                task=f"knn/{search.kind}",
                dataset=split,
                metric="knn_top1",
                value=float(hits.mean()),
                n=len(hits),
                ci95=context.interval(hits),
                encoders=search.encoders,
                protocol={
                    "k": k,
                    "temperature": settings.knn_temperature,
                    "vote": "exp(cosine / temperature), equal votes to the lower class",
                    "vectors": search.about,
                    "reference": reference,
                    "reference_rows": len(voter_labels),
                    "chance": round(1 / num_classes, 8),
                }
                | about,
            ),
            rows,
            Items(hits),
        )


def find_neighbours(
    settings: EvalConfig,
    queries: Float[np.ndarray, "queries dim"],
    reference: Callable[[], Iterator[Float[np.ndarray, "_ dim"]]],
    rows: int,
    k: int,
) -> tuple[Neighbours, dict[str, object]]:
    """Search as the settings say, and return what is told of it in the protocol.

    Args:
        settings: Exactly, or with an index.
        queries: Vectors of any length.
        reference: Reads the blocks of rows anew, in order.
        rows: Of the reference.
        k: Neighbours of each query.
    """
    if settings.knn_search == "exact" or rows < LEAST_ROWS:
        if settings.knn_search != "exact":
            logger.info("%d rows are searched exactly: IVF-PQ takes %d", rows, LEAST_ROWS)
        about: dict[str, object] = {"search": "exact", "searched_with": flat_search().name}
        logger.info("k-NN among %d rows by %s", rows, flat_search().name)
        return nearest_neighbours(queries, reference(), k), about
    found = approximate_neighbours(queries, reference, rows, k, seed=settings.seed)
    logger.info("k-NN among %d rows by %s: recall %.3f", rows, found.about, found.recall)
    return found.neighbours, {
        "search": found.about,
        "searched_with": "FAISS on the CPU: eval.knn_search = 'ivf-pq'",
        "recall": round(found.recall, 6),
        "recall_of": f"the exact {k} nearest of {found.recall_queries} queries",
    }
