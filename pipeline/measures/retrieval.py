"""Retrieval on a split: over all its caption fields, and over each that has a name."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from evaluate.items import Items
from evaluate.report import ExamplePanel
from evaluate.results import Result
from evaluate.retrieval import (
    Ranks,
    Relevance,
    chance_recall,
    hits_per_image,
    median_rank,
    recall,
    retrieval_ranks,
    same_words,
)
from features.errors import EvaluationError
from pipeline.evaluation.examples import Gallery, Search, draw, search_example
from pipeline.measures.context import TIES, Context

RECALL_AT = (1, 5, 10)
REPEATED = 0.02  # above this share of captions that repeat, the report says so


@dataclass(frozen=True)
class Pool:
    """The images and captions among which is searched."""

    rows: Int64[np.ndarray, "images"]
    """Rows of the store whose image and at least one caption can be used."""
    image: Float[Tensor, "images dim"]
    text: Float[Tensor, "texts dim"]
    owner: Int64[np.ndarray, "texts"]
    captions: list[str]
    relevance: Relevance


def score_retrieval(context: Context, split: str) -> None:
    """Score both directions.

    Fields that are numbers are captions of one kind; fields with names (`short`, `long`) are of
    different kinds, and so each is also a data set of its own.
    """
    settings = context.config.eval
    fields = context.caption_fields(split, settings.retrieval_fields, "retrieval_fields")
    parts = {split: fields}
    if len(fields) > 1 and not all(name.isdigit() for name in fields):
        parts |= {f"{split}/{name}": (name,) for name in fields}
    for dataset, names in parts.items():
        pool = _pool(context, split, names)
        ranks = retrieval_ranks(pool.image, pool.text, pool.relevance)
        _note_repeated(context, dataset, pool)
        _add_results(context, dataset, names, pool, ranks)
        if dataset == split:
            _add_examples(context, split, pool, ranks)


def _pool(context: Context, split: str, fields: tuple[str, ...]) -> Pool:
    store, embedder = context.stores[split], context.embedder
    images = embedder.images(store)
    texts = [embedder.captions(store, name) for name in fields]
    with_text = np.unique(np.concatenate([text.rows for text in texts]))
    rows = np.intersect1d(images.rows, with_text)
    if not len(rows):
        raise EvaluationError(
            f"{store.path} has no row whose image and caption are both ok. At least one was "
            f"expected. See why with `sail inspect {store.path}`."
        )
    vectors, owners, captions = [], [], []
    for name, text in zip(fields, texts, strict=True):
        kept = np.isin(text.rows, rows)
        vectors.append(text.vectors[torch.from_numpy(kept).to(text.vectors.device)])
        owners.append(np.searchsorted(rows, text.rows[kept]))
        captions += store.captions(name)[text.rows[kept]].tolist()
    owner, device = np.concatenate(owners), images.vectors.device
    words = None
    if context.config.eval.retrieval_positives == "identical":
        words = torch.from_numpy(same_words(captions)).to(device)
    return Pool(
        rows=rows,
        image=images.vectors[torch.from_numpy(np.searchsorted(images.rows, rows)).to(device)],
        text=torch.cat(vectors),
        owner=owner,
        captions=captions,
        relevance=Relevance(len(rows), torch.from_numpy(owner).to(device), words),
    )


def _note_repeated(context: Context, dataset: str, pool: Pool) -> None:
    if pool.relevance.words is not None:
        return
    words = same_words(pool.captions)
    pairs = np.unique(np.stack([words, pool.owner], axis=1), axis=0)
    images = np.bincount(pairs[:, 0])
    share = float(np.mean(images[words] > 1))
    if share > REPEATED:
        context.findings.note(
            f"{100 * share:.0f} % of the captions of {dataset} are, word for word, also the "
            f"caption of another image. In retrieval these count as wrong, as is usual, so that "
            f'recall cannot be perfect. Set eval.retrieval_positives = "identical" to count them '
            f"as right."
        )


def _add_results(
    context: Context, dataset: str, fields: tuple[str, ...], pool: Pool, ranks: Ranks
) -> None:
    images, texts = len(pool.rows), len(pool.owner)
    protocol = {
        "captions": list(fields),
        "positives": context.config.eval.retrieval_positives,
        "ties": TIES,
    }
    for task, by_query, right, gallery in (
        ("retrieval/image_to_text", ranks.by_image, ranks.right_texts, texts),
        ("retrieval/text_to_image", ranks.by_text, ranks.right_images, images),
    ):
        owner = np.arange(images) if task.endswith("to_text") else pool.owner
        # Results are fractions, and a protocol holds what is set: a rank is neither.
        context.findings.note(
            f"The median rank of {task.removeprefix('retrieval/').replace('_', ' ')} in "
            f"{dataset} is {median_rank(by_query):g} of {gallery:,}."
        )
        for k in RECALL_AT:
            hits, counts = hits_per_image(by_query, owner, images=images, k=k)
            context.add(
                Result(
                    task=task,
                    dataset=dataset,
                    metric=f"recall@{k}",
                    value=recall(by_query, k),
                    n=images,
                    ci95=context.interval(hits, counts),
                    encoders=context.encoders,
                    protocol=protocol
                    | {
                        "k": k,
                        "queries": len(by_query),
                        "gallery": gallery,
                        "chance": chance_recall(right, gallery, k),
                    },
                ),
                pool.rows,
                Items(hits, counts),
            )


def _add_examples(context: Context, split: str, pool: Pool, ranks: Ranks) -> None:
    """Search again for a few queries, to show what they found."""
    settings = context.config.eval
    gallery = Gallery(context.config, context.folder, context.stores[split], split)

    def captions_for(image: int) -> Search:
        right = pool.relevance.right(slice(image, image + 1), slice(0, len(pool.owner)))[0]
        return Search(
            words=gallery.key(int(pool.rows[image])),
            picture=gallery.picture(int(pool.rows[image])),
            rank=int(ranks.by_image[image]) + 1,
            cosines=(pool.text @ pool.image[image]).cpu().numpy(),
            right=right.cpu().numpy(),
            item=lambda text: (pool.captions[text], None),
        )

    def images_for(text: int) -> Search:
        right = pool.relevance.right(slice(0, len(pool.rows)), slice(text, text + 1))[:, 0]
        return Search(
            words=pool.captions[text],
            picture=None,
            rank=int(ranks.by_text[text]) + 1,
            cosines=(pool.image @ pool.text[text]).cpu().numpy(),
            right=right.cpu().numpy(),
            item=lambda image: (
                gallery.key(int(pool.rows[image])),
                gallery.picture(int(pool.rows[image])),
            ),
        )

    for task, by_query, search in (
        ("retrieval/text_to_image", ranks.by_text, images_for),
        ("retrieval/image_to_text", ranks.by_image, captions_for),
    ):
        chosen = draw(by_query == 0, settings.examples, seed=settings.seed)
        examples = tuple(search_example(search(query)) for query in chosen)
        context.findings.panels.append(ExamplePanel(task, split, examples))
