"""k-NN classification of a labelled split by the rows of another."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float, Int64
from pydantic import PositiveFloat, PositiveInt

from evaluate.config import EvalSettings, Names
from evaluate.measures.measure import Context, Headline, Measure, Splits, is_labelled
from evaluate.nearest import (
    LEAST_ROWS,
    Neighbours,
    approximate_neighbours,
    flat_search,
    nearest_neighbours,
    vote,
)
from evaluate.results import Findings, Items, Result
from features.config import EachOnce
from features.errors import EvaluationError
from features.storage.column import Column
from features.store import FeatureStore

logger = logging.getLogger(__name__)
Vectors = Callable[[Column, Int64[np.ndarray, "rows"]], Iterator[np.ndarray]]
STANDARD_K = 20  # the k that DINO reports
VECTORS = {
    "image_features": "frozen image features",
    "image_embeddings": "aligned image embeddings",
    "cross_modal": "aligned, images against captions",
}


class KnnSettings(EvalSettings):
    """Settings of k-NN classification."""

    knn: Names = ()
    """Splits for k-NN classification (queries); every labelled split with the classes of the
    reference but the training split, the reference and those with groups, if empty."""
    knn_reference: str | None = None
    """Labelled split whose rows vote; the training split if not given."""
    knn_k: Annotated[tuple[PositiveInt, ...], EachOnce] = (10, 20, 100, 200)
    """Numbers of neighbours that are tried."""
    knn_temperature: PositiveFloat = 0.07
    """T of the votes exp(cosine / T) (DINO)."""
    knn_search: Literal["exact", "ivf-pq"] = "exact"
    """`exact`: every query is compared with every row. `ivf-pq`: with those that a FAISS index of
    coarse codes finds, for millions of rows; the protocol has the share of the exact neighbours
    that it found."""


class Knn(Measure):
    """Accuracy of the class that the nearest rows of a reference vote for."""

    name = "knn"
    title = "k-NN"
    in_short = "The class that the nearest rows vote for: by frozen features, or by embeddings"
    explained = (
        "The class of a picture is voted on by the k reference rows nearest to it. With **frozen "
        "image features** this judges the image encoder alone, before any alignment, and tells how "
        "much there is to align; with the **aligned embeddings**, what the head kept of it. "
        "**Images against captions** lets captions of the reference vote: the two modalities have "
        "to share one space."
    )
    method = (
        "The nearest by cosine, searched as `search` and `searched_with` in the protocol say. "
        "Votes weigh exp(cosine / T), as in DINO’s protocol."
    )
    metric = "knn_top1"
    settings = KnnSettings
    needs = "labels"
    template = "knn.html.j2"

    def mentions(self, settings: EvalSettings) -> dict[str, Sequence[str]]:
        """Return also the reference."""
        reference = settings.of(KnnSettings).knn_reference
        named = {} if reference is None else {"eval.knn_reference": (reference,)}
        return super().mentions(settings) | named

    def splits(self, settings: EvalSettings, splits: Splits) -> tuple[str, ...]:
        """Return the splits with the classes of the reference, where that has labels."""
        own = settings.of(KnnSettings)
        if own.knn_reference is None and not splits.trained:
            if own.knn:
                raise EvaluationError(
                    "eval.knn names splits, but the run has none that was trained on, whose rows "
                    "would vote. A labelled split was expected. Set eval.knn_reference."
                )
            return ()
        reference = knn_reference(settings, splits.trained)
        voters = splits.stores[reference]
        if not is_labelled(voters):
            if not own.knn and own.knn_reference is None:
                return ()
            raise EvaluationError(
                f"The reference split of k-NN, {reference!r}, has no labels. A labelled split was "
                f"expected. Set eval.knn_reference, or leave eval.knn empty."
            )

        def can_be_voted_on(store: FeatureStore) -> bool:
            is_other = store.path != voters.path
            return is_other and is_labelled(store) and store.class_names == voters.class_names

        needs = f"labels of the same classes as {reference!r}, or is that split itself"
        return splits.choose("eval.knn", own.knn, needs, can_be_voted_on)

    def uses(self, settings: EvalSettings, splits: Splits) -> dict[str, tuple[str, ...]]:
        """Return the splits whose rows ask, and that whose rows vote."""
        queries = self.splits(settings, splits)
        reference = (knn_reference(settings, splits.trained),) if queries else ()
        return {"k-NN queries": queries, "k-NN reference": reference}

    def run(self, context: Context, split: str) -> Findings:
        """Score features of every image encoder, the embeddings, and images against captions."""
        from evaluate.embedder import complete_column

        found, embedder = Findings(), context.embedder
        reference = knn_reference(context.settings, context.trained)
        queries, voters = context.stores[split], context.stores[reference]
        votes = [
            _Vote(
                "image_features",
                {"image": name, "text": None},
                complete_column(queries, f"image/{name}"),
                [complete_column(voters, f"image/{name}")],
                Column.blocks,
                "frozen features, not centred",
            )
            for name in context.image_columns
        ]
        query, voter = embedder.image_column(queries), embedder.image_column(voters)
        of_head = context.encoders, query
        about = "aligned image embeddings"
        votes.append(_Vote("image_embeddings", *of_head, [voter], embedder.blocks, about))
        if voters.fields:
            texts = [embedder.text_column(voters, name) for name in voters.fields]
            fields = ", ".join(voters.fields)
            about = f"aligned images against the captions {fields} of the reference"
            votes.append(_Vote("cross_modal", *of_head, texts, embedder.blocks, about))
        for each in votes:
            _score(context, found, split, reference, each)
        return found

    def variant(self, result: Result) -> str:
        """Return the number of neighbours, and the encoder."""
        return f"k = {result.protocol['k']}, {result.encoders['image']}"

    def label(self, result: Result) -> str:
        """Return the vectors and the number of neighbours."""
        vectors = result.task.removeprefix("knn/").replace("_", " ")
        return f"{vectors}, {self.variant(result)}"

    def headlines(self, results: Sequence[Result]) -> list[Headline]:
        """Return the accuracy by frozen features, for the k that is usual."""
        frozen = [each for each in results if each.task == "knn/image_features"]
        usual = [each for each in frozen if each.protocol.get("k") == STANDARD_K] or frozen
        return [
            Headline(
                "k-NN, image encoder alone",
                f"Class by the {each.protocol.get('k')} nearest frozen image features: no text, no "
                f"training",
                each,
            )
            for each in usual[:1]
        ]

    def view(self, results: Sequence[Result], exhibits: Sequence[Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the tables, and what the vectors are called."""
        return {"tables": knn_tables(results), "vector_names": VECTORS}


def knn_reference(settings: EvalSettings, trained: Sequence[str]) -> str:
    """Return the split whose rows vote: the one that is named, or the first that is trained on."""
    return settings.of(KnnSettings).knn_reference or trained[0]


@dataclass(frozen=True)
class _Vote:
    """Which vectors ask, which answer, and what they are."""

    kind: str
    encoders: dict[str, str | None]
    query: Column
    voters: Sequence[Column]
    vectors: Vectors
    about: str


def _score(context: Context, found: Findings, split: str, reference: str, asked: _Vote) -> None:
    settings = context.settings.of(KnnSettings)
    rows, labels = context.labelled_rows(split, asked.query)
    voters = [(column, *context.labelled_rows(reference, column)) for column in asked.voters]
    voter_labels = np.concatenate([voted for _, _, voted in voters])
    ks = [k for k in settings.knn_k if k <= len(voter_labels)]
    if dropped := sorted(set(settings.knn_k) - set(ks)):
        found.note(
            f"k-NN with k = {', '.join(map(str, dropped))} is left out: {reference} has only "
            f"{len(voter_labels)} rows that can vote."
        )
    if not ks:
        return
    neighbours, about = find_neighbours(
        settings,
        np.concatenate(list(asked.vectors(asked.query, rows))),
        lambda: (block for column, chosen, _ in voters for block in asked.vectors(column, chosen)),
        len(voter_labels),
        max(ks),
    )
    num_classes = int(max(labels.max(), voter_labels.max())) + 1
    num_classes = max(num_classes, len(context.stores[split].class_names or ()))
    temperature = settings.knn_temperature
    for k in ks:
        predicted = vote(
            neighbours, voter_labels, k=k, temperature=temperature, num_classes=num_classes
        )
        context.add(
            found,
            Items((predicted == labels).astype(np.int64), rows=rows[:, None]),
            task=f"knn/{asked.kind}",
            dataset=split,
            metric="knn_top1",
            encoders=asked.encoders,
            protocol={
                "k": k,
                "temperature": temperature,
                "vote": "exp(cosine / temperature), equal votes to the lower class",
                "vectors": asked.about,
                "reference": reference,
                "reference_rows": len(voter_labels),
                "chance": round(1 / num_classes, 8),
            }
            | about,
        )


def find_neighbours(
    settings: KnnSettings,
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


@dataclass(frozen=True)
class KnnRow:
    """The accuracies of one kind of vectors, by k."""

    vectors: str
    encoder: str
    by_k: dict[int, Result]
    best: int


@dataclass(frozen=True)
class KnnTable:
    """All k-NN accuracies of a split."""

    dataset: str
    reference: str
    ks: list[int]
    rows: list[KnnRow]


def knn_tables(results: Sequence[Result]) -> list[KnnTable]:
    """Arrange the k-NN accuracies: a table per split, a row per kind of vectors, a column per k."""
    tables = []
    for dataset in dict.fromkeys(result.dataset for result in results):
        of_split = [result for result in results if result.dataset == dataset]
        kinds = dict.fromkeys((r.task, r.encoders["image"], r.encoders["text"]) for r in of_split)
        rows = []
        for kind in kinds:
            same = [r for r in of_split if (r.task, *r.encoders.values()) == kind]
            by_k = {int(r.protocol["k"]): r for r in same}
            best = max(by_k, key=lambda k: by_k[k].value)
            names = [name for name in kind[1:] if name]
            rows.append(KnnRow(kind[0].removeprefix("knn/"), " + ".join(names), by_k, best))
        ks = sorted({k for row in rows for k in row.by_k})
        tables.append(KnnTable(dataset, str(of_split[0].protocol["reference"]), ks, rows))
    return tables
