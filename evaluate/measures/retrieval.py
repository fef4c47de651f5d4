"""Retrieval on a split: over all its caption fields, and over each that has a name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float, Int64
from pydantic import PositiveInt

from evaluate.config import EvalSettings, Names, Score
from evaluate.examples import ExamplePanel, ExampleQuery, draw, search_example
from evaluate.measures.measure import TIES, Context, Headline, Measure, Splits, Tensor
from evaluate.results import Findings, Items, Result
from features.config import EachOnce
from features.errors import EvaluationError, UnusableSplitError

RECALL_AT = (1, 5, 10)
LANGUAGE = re.compile(r"([a-z]{2}|fil|quz)([-_][A-Za-z0-9]{2,8})?")
"""What kinds of captions are called that are languages: ISO 639-1, and XM3600's two others."""
REPEATED = 0.02  # above this share of captions that repeat, the report says so
DIRECTIONS = {
    "retrieval/image_to_text": ("image → text", "Image → caption", "A right caption comes first"),
    "retrieval/text_to_image": (
        "text → image",
        "Caption → image",
        "The right image comes first",
    ),
}
"""Of each task: its label, its title, and what its recall@1 says."""


class RetrievalSettings(EvalSettings):
    """Settings of retrieval."""

    retrieval: Names = ()
    """Splits for image–text retrieval; every split but the training split, those with labels only
    and those with groups, if empty."""
    retrieval_fields: Names = ()
    """Caption fields that are searched; all if empty. Fields that have names rather than numbers
    are also scored one by one."""
    retrieval_positives: Literal["own", "identical"] = "own"
    """`own`: only an image's own captions are right (the usual protocol). `identical`: also those
    of other images with the same words, for captions that repeat."""
    retrieval_scores: Annotated[
        tuple[Literal["cosine", Score, "inverted-softmax-transductive"], ...], EachOnce
    ] = ("cosine",)
    """By what items are ranked, beside the cosine, which is always there. `csls`,
    `inverted-softmax` and `dual-bank` take off the cosine how near an item is to a bank of
    training rows; the transductive form has the queries of the test itself as its bank, and so is
    no score of single queries."""
    retrieval_dims: Annotated[tuple[PositiveInt, ...], EachOnce] = ()
    """Rank also by so many of the first numbers of each embedding, as `[32, 64, 128]`: what a
    smaller index would find. Of a `linear` head from the closed form, whose numbers are in
    order."""


class Retrieval(Measure):
    """Recall of images by captions, and of captions by images."""

    name = "retrieval"
    title = "Retrieval"
    in_short = "The right caption of an image, the right image of a caption"
    explained = (
        "A caption looks for its image among all images of the split, or an image for one of its "
        "captions among all captions. **recall@k** is the share of queries that have a right "
        "answer among the first k. Kinds of captions, where there are several, are also shown "
        "apart."
    )
    metric = "recall@1"
    settings = RetrievalSettings
    template = "retrieval.html.j2"

    def run(self, context: Context, split: str) -> Findings:
        """Score both directions.

        Fields that are numbers are captions of one kind; fields with names (`short`, `long`) are of
        different kinds, and so each is also a data set of its own, those of a language (`de.0`,
        `de.1`) together. Of languages there is their mean too.
        """
        from align.heldout import retrieval_ranks

        found, settings = Findings(), context.settings.of(RetrievalSettings)
        fields = context.caption_fields(split, settings.retrieval_fields, "retrieval_fields")
        parts = {split: fields}
        if len(fields) > 1 and not all(name.isdigit() for name in fields):
            parts |= _kinds(split, fields)
        for dataset, names in parts.items():
            pairs = _searched(context, split, names)
            _note_repeated(found, dataset, pairs)
            for score in dict.fromkeys(("cosine", *settings.retrieval_scores)):
                offsets, about = _offsets(context, pairs, score)
                ranks = retrieval_ranks(pairs.image, pairs.text, pairs.relevance, offsets)
                arrays = {name: value.cpu().numpy() for name, value in vars(ranks).items()}
                protocol = {
                    "captions": list(names),
                    "positives": settings.retrieval_positives,
                    "ties": TIES,
                }
                _add_results(context, found, dataset, pairs, arrays, protocol | about)
                if dataset == split and score == "cosine":
                    _add_examples(context, found, split, pairs, arrays)
            for dim in settings.retrieval_dims:
                _check_ordered(context, dim)
                ranks = retrieval_ranks(pairs.image[:, :dim], pairs.text[:, :dim], pairs.relevance)
                arrays = {name: value.cpu().numpy() for name, value in vars(ranks).items()}
                shorter = protocol | {"score": f"the first {dim} numbers", "dim": dim}
                _add_results(context, found, dataset, pairs, arrays, shorter)
        _add_mean_over_languages(found, split)
        return found

    def splits(self, settings: EvalSettings, splits: Splits) -> tuple[str, ...]:
        """Return the splits; raises also where a score needs training rows and there are none."""
        scores = [each for each in settings.of(RetrievalSettings).retrieval_scores if _needs(each)]
        if scores and not splits.stores.keys() & set(splits.trained):
            raise EvaluationError(
                f"eval.retrieval_scores has {scores[0]!r}, whose bank is rows of the training, but "
                f"the run has no split that was trained on. Such a split was expected in [data]. "
                f"Add it, or take the score out."
            )
        return super().splits(settings, splits)

    def variant(self, result: Result) -> str:
        """Return the score, where it is not the cosine."""
        return str(result.protocol.get("score", ""))

    def label(self, result: Result) -> str:
        """Return the direction, the metric, and the score where it is not the cosine."""
        return ", ".join(
            filter(None, [DIRECTIONS[result.task][0], result.metric, self.variant(result)])
        )

    def headlines(self, results: Sequence[Result]) -> list[Headline]:
        """Return the recall@1 of either direction."""
        firsts: dict[str, Result] = {}
        for result in results:
            if result.metric == self.metric:
                firsts.setdefault(result.task, result)
        return [
            Headline(title, in_short, firsts[task])
            for task, (_, title, in_short) in reversed(DIRECTIONS.items())
            if task in firsts
        ]

    def view(self, results: Sequence[Result], exhibits: Sequence[Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the titles of the directions, and the results of each line of the table."""
        lines: dict[tuple[str, str, str], list[Result]] = {}
        for each in results:
            lines.setdefault((each.dataset, each.task, self.variant(each)), []).append(each)
        return {
            "titles": {task: title for task, (_, title, _) in DIRECTIONS.items()},
            "lines": lines,
        }


@dataclass(frozen=True)
class _Searched:
    """The images and captions among which is searched."""

    rows: Int64[np.ndarray, "images"]
    """Rows of the store whose image and at least one caption can be used."""
    image: Float[Tensor, "images dim"]
    text: Float[Tensor, "texts dim"]
    owner: Int64[np.ndarray, "texts"]
    captions: list[str]
    relevance: Any


def recall(ranks: Int64[np.ndarray, "queries"], k: int) -> float:
    """Return the fraction of queries with a right item among the k nearest."""
    return float(np.mean(ranks < k))


def median_rank(ranks: Int64[np.ndarray, "queries"]) -> float:
    """Return the median place, from 1, at which a query's nearest right item stands."""
    return float(np.median(ranks)) + 1


def chance_recall(right: Int64[np.ndarray, "queries"], gallery: int, k: int) -> float:
    """Return the recall@k of a random order.

    Args:
        right: Right items of each query.
        gallery: Items in all.
        k: Items looked at.
    """
    missed = np.ones(len(right))
    for drawn in range(min(k, gallery)):
        missed *= np.clip(1 - right / (gallery - drawn), 0, 1)
    return round(float(np.mean(1 - missed)), 8)


def hits_per_image(
    ranks: Int64[np.ndarray, "texts"], owner: Int64[np.ndarray, "texts"], *, images: int, k: int
) -> tuple[Int64[np.ndarray, "images"], Int64[np.ndarray, "images"]]:
    """Count, for each image, its captions that find a right image, and its captions.

    Captions of one image are not independent, so intervals are taken over images.
    """
    hits = np.bincount(owner[ranks < k], minlength=images)
    return hits, np.bincount(owner, minlength=images)


def same_words(captions: Sequence[str]) -> Int64[np.ndarray, "texts"]:
    """Number the distinct strings, in order of first sight."""
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(caption, len(numbers)) for caption in captions], dtype=np.int64
    )


def _kinds(split: str, fields: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the fields of each kind, which a number behind a dot does not tell apart."""
    kinds: dict[str, tuple[str, ...]] = {}
    for name in fields:
        stem, _, number = name.rpartition(".")
        kind = f"{split}/{stem if stem and number.isdigit() else name}"
        kinds[kind] = (*kinds.get(kind, ()), name)
    return kinds


def _add_mean_over_languages(found: Findings, split: str) -> None:
    """Add the mean of every number over the languages, each counted alike; without an interval."""
    numbers: dict[tuple[str, ...], list[Result]] = {}
    for result in found.results:
        language = result.dataset.partition("/")[2].rpartition(".")[2]
        if LANGUAGE.fullmatch(language):
            score = str(result.protocol.get("score", ""))
            numbers.setdefault((result.task, result.metric, score), []).append(result)
    for results in numbers.values():
        if len(results) < 2:
            continue
        first, chances = results[0], [float(each.protocol["chance"]) for each in results]
        protocol = {
            **first.protocol,
            "captions": [name for each in results for name in each.protocol["captions"]],
            "queries": sum(each.protocol["queries"] for each in results),
            "gallery": max(each.protocol["gallery"] for each in results),
            "chance": round(float(np.mean(chances)), 8),
            "mean_over": [each.dataset.partition("/")[2] for each in results],
        }
        protocol.pop("rows_sha256", None)
        mean = replace(
            first,
            dataset=f"{split}/mean of {len(results)} languages",
            value=float(np.mean([each.value for each in results])),
            n=sum(each.n for each in results),
            ci95=None,
            protocol=protocol,
        )
        found.add(mean)


def _searched(context: Context, split: str, fields: tuple[str, ...]) -> _Searched:
    import torch

    from align.heldout import Relevance

    store, embedder = context.stores[split], context.embedder
    images = embedder.images(store)
    texts = [embedder.captions(store, name) for name in fields]
    rows = np.intersect1d(images.rows, np.concatenate([text.rows for text in texts]))
    if not len(rows):
        raise UnusableSplitError(
            f"{store.path} has no row whose image and caption are both ok. At least one was "
            f"expected. See why with `sail inspect {store.path}`."
        )
    vectors, owners, captions = [], [], []
    for name, text in zip(fields, texts, strict=True):
        kept = text.rows[np.isin(text.rows, rows)]
        vectors.append(text.at(kept))
        owners.append(np.searchsorted(rows, kept))
        captions += store.captions(name)[kept].tolist()
    owner, device = np.concatenate(owners), images.vectors.device
    words = None
    if context.settings.of(RetrievalSettings).retrieval_positives == "identical":
        words = torch.from_numpy(same_words(captions)).to(device)
    return _Searched(
        rows=rows,
        image=images.at(rows),
        text=torch.cat(vectors),
        owner=owner,
        captions=captions,
        relevance=Relevance(len(rows), torch.from_numpy(owner).to(device), words),
    )


def _check_ordered(context: Context, dim: int) -> None:
    align = context.embedder.checkpoint.run["align"]
    kind, start, most = align["head"]["kind"], align.get("start", "random"), align["head"]["dim"]
    if (kind, start) != ("linear", "cca") or dim > most:
        raise EvaluationError(
            f"eval.retrieval_dims has {dim}, and the head is a {kind} one of {most} numbers from "
            f"start = {start!r}. A linear head from the closed form with as many was expected, for "
            f"its numbers are in order. Take {dim} out, or train such a head."
        )


def _needs(score: str) -> bool:
    """Return whether a score needs a bank of training rows."""
    return score not in ("cosine", "inverted-softmax-transductive")


def _offsets(
    context: Context, pairs: _Searched, score: Any
) -> tuple[tuple[Tensor, Tensor] | None, dict[str, Any]]:
    """Return what a score takes off the cosines, and what its results say of it."""
    if score == "cosine":
        return None, {}
    from evaluate.hubness import Bank, draw_bank, embeddings_of

    embedder = context.embedder

    def drawn() -> Bank:
        rows = draw_bank(embedder, context.stores, context.trained, context.settings.seed)
        return Bank.of(rows, embeddings_of(embedder), embedder.device)

    bank = context.once("bank", drawn) if _needs(score) else Bank(pairs.image, pairs.text)
    scale = embedder.model.scale_and_bias[0]
    form: Score = score if _needs(score) else "inverted-softmax"
    offsets = (
        bank.offsets(form, pairs.image, asked_by="text", scale=scale),
        bank.offsets(form, pairs.text, asked_by="image", scale=scale),
    )
    size = {"images": len(bank.image), "captions": len(bank.text)}
    of = "training" if _needs(score) else "the rows that are searched"
    return offsets, {"score": score, "bank": {"of": of} | size, "scale": round(scale, 4)}


def _note_repeated(found: Findings, dataset: str, pairs: _Searched) -> None:
    if pairs.relevance.words is not None:
        return
    words = same_words(pairs.captions)
    images = np.bincount(np.unique(np.stack([words, pairs.owner], axis=1), axis=0)[:, 0])
    share = float(np.mean(images[words] > 1))
    if share > REPEATED:
        found.note(
            f"{100 * share:.0f} % of the captions of {dataset} are, word for word, also the "
            f"caption of another image. In retrieval these count as wrong, as is usual, so that "
            f'recall cannot be perfect. Set eval.retrieval_positives = "identical" to count them '
            f"as right."
        )


def _add_results(
    context: Context,
    found: Findings,
    dataset: str,
    pairs: _Searched,
    ranks: dict[str, np.ndarray],
    protocol: dict[str, Any],
) -> None:
    images, texts = len(pairs.rows), len(pairs.owner)
    for task, by_query, right, owner, gallery in (
        (
            "retrieval/image_to_text",
            ranks["by_image"],
            ranks["right_texts"],
            np.arange(images),
            texts,
        ),
        ("retrieval/text_to_image", ranks["by_text"], ranks["right_images"], pairs.owner, images),
    ):
        # Results are fractions, and a protocol holds what is set: a rank is neither.
        by_score = f" by {protocol['score']}" if "score" in protocol else ""
        found.note(
            f"The median rank of {task.removeprefix('retrieval/').replace('_', ' ')} in "
            f"{dataset}{by_score} is {median_rank(by_query):g} of {gallery:,}."
        )
        for k in RECALL_AT:
            hits, counts = hits_per_image(by_query, owner, images=images, k=k)
            context.add(
                found,
                Items(hits, counts, rows=pairs.rows[:, None]),
                task=task,
                dataset=dataset,
                metric=f"recall@{k}",
                protocol=protocol
                | {
                    "k": k,
                    "queries": len(by_query),
                    "gallery": gallery,
                    "chance": chance_recall(right, gallery, k),
                },
            )


def _add_examples(
    context: Context, found: Findings, split: str, pairs: _Searched, ranks: dict[str, np.ndarray]
) -> None:
    """Search again for a few queries, to show what they found."""
    settings, gallery = context.settings, context.gallery(split)

    def captions_for(image: int) -> ExampleQuery:
        right = pairs.relevance.right(slice(image, image + 1), slice(0, len(pairs.owner)))[0]
        row = int(pairs.rows[image])
        return ExampleQuery(
            words=gallery.key(row),
            picture=gallery.picture(row),
            rank=int(ranks["by_image"][image]) + 1,
            cosines=(pairs.text @ pairs.image[image]).cpu().numpy(),
            right=right.cpu().numpy(),
            item=lambda text: (pairs.captions[text], None),
        )

    def images_for(text: int) -> ExampleQuery:
        right = pairs.relevance.right(slice(0, len(pairs.rows)), slice(text, text + 1))[:, 0]
        return ExampleQuery(
            words=pairs.captions[text],
            picture=None,
            rank=int(ranks["by_text"][text]) + 1,
            cosines=(pairs.image @ pairs.text[text]).cpu().numpy(),
            right=right.cpu().numpy(),
            item=lambda image: (
                gallery.key(int(pairs.rows[image])),
                gallery.picture(int(pairs.rows[image])),
            ),
        )

    for task, by_query, query in (
        ("retrieval/text_to_image", ranks["by_text"], images_for),
        ("retrieval/image_to_text", ranks["by_image"], captions_for),
    ):
        chosen = draw(by_query == 0, settings.examples, seed=settings.seed)
        examples = tuple(search_example(query(each)) for each in chosen)
        found.exhibits.append(ExamplePanel(task, split, examples))
