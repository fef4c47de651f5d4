"""Retrieval on a split: over all its caption fields, and over each that has a name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from evaluate.examples import Gallery, Search, draw, search_example
from evaluate.measures.context import TIES, Context
from evaluate.report import ExamplePanel
from evaluate.results import Items, Result
from features.errors import EvaluationError

COSINES_AT_ONCE = 1 << 23
TIE = 1e-6
"""Cosines that differ by less are the same: float32 products of equal vectors differ so much."""


@dataclass(frozen=True)
class Relevance:
    """Which captions are right for which images."""

    images: int
    owner: Int64[Tensor, "texts"]
    """Image that each caption came with; every image has one at least."""
    words: Int64[Tensor, "texts"] | None = None
    """Equal where captions are the same string: then a caption is right for every image that came
    with these words. None: only an image's own captions are right."""

    def right(self, images: slice, texts: slice) -> Bool[Tensor, "block_images block_texts"]:
        """Return which captions of a block are right for which images of a block."""
        if self.words is None:
            numbers = torch.arange(images.start, images.stop, device=self.owner.device)
            return self.owner[texts] == numbers[:, None]
        matrix = torch.zeros(
            images.stop - images.start,
            texts.stop - texts.start,
            dtype=torch.bool,
            device=self.owner.device,
        )
        for words in self._words_of_images[images].unbind(dim=1):
            matrix |= words[:, None] == self.words[texts]
        return matrix

    @cached_property
    def _words_of_images(self) -> Int64[Tensor, "images most_captions"]:
        """Return the words of each image's captions, filled up with -1."""
        if self.words is None:
            raise ValueError("There are no words: only an image's own captions are right.")
        order = torch.argsort(self.owner, stable=True)
        counts = torch.bincount(self.owner, minlength=self.images)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=order.device) - first[self.owner[order]]
        table = torch.full(
            (self.images, int(counts.max())), -1, dtype=torch.int64, device=order.device
        )
        table[self.owner[order], place] = self.words[order]
        return table


@dataclass(frozen=True)
class Ranks:
    """For each query, how many wrong items are as near as its nearest right one."""

    by_image: Int64[np.ndarray, "images"]
    """Of image queries: 0 when a right caption is nearest of all."""
    by_text: Int64[np.ndarray, "texts"]
    """Of caption queries: 0 when a right image is nearest of all."""
    right_texts: Int64[np.ndarray, "images"]
    """Captions that are right for each image."""
    right_images: Int64[np.ndarray, "texts"]
    """Images that are right for each caption."""


def retrieval_ranks(
    image: Float[Tensor, "images dim"], text: Float[Tensor, "texts dim"], relevance: Relevance
) -> Ranks:
    """Rank every caption for every image and the other way round, block by block.

    A wrong item that is as near as the right one (to within 1e-6 of cosine) counts as nearer, and
    so does one whose cosine is not a number: embeddings that are all the same score nothing.

    Goes over all pairs once, or twice where equal words are right, since then the nearest right
    image of a caption is known only after the first time; no more than `COSINES_AT_ONCE` cosines
    are held.

    Args:
        image: Image embeddings of any length; normalised here.
        text: Caption embeddings, likewise.
        relevance: What is right.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    nearest = _nearest_own if relevance.words is None else _nearest_of_equal_words
    best_of_image, best_of_text, right_of_image, right_of_text = nearest(image, text, relevance)
    by_image, by_text = _zeros(image), _zeros(text)
    for images, texts, cosine, right in _blocks(image, text, relevance):
        # "Not lower" rather than "higher or equal", so that a NaN on either side counts.
        by_image[images] += (~(cosine < best_of_image[images, None] - TIE) & ~right).sum(dim=1)
        by_text[texts] += (~(cosine < best_of_text[texts] - TIE) & ~right).sum(dim=0)
    arrays = (by_image, by_text, right_of_image, right_of_text)
    return Ranks(*(array.cpu().numpy() for array in arrays))


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


Nearest = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of each image and of each caption, the cosine of the nearest right item; then their numbers."""


def _nearest_own(
    image: Float[Tensor, "images dim"], text: Float[Tensor, "texts dim"], relevance: Relevance
) -> Nearest:
    """Compare each caption with its own image only."""
    owner = relevance.owner
    step = max(1, COSINES_AT_ONCE // max(image.shape[1], 1))
    parts = [
        (text[start : start + step] * image[owner[start : start + step]]).sum(dim=1)
        for start in range(0, len(text), step)
    ]
    of_text = torch.cat(parts) if parts else text.new_empty(0)
    of_image = image.new_full((len(image),), -torch.inf)
    of_image = of_image.scatter_reduce(0, owner, of_text, "amax")
    return of_image, of_text, torch.bincount(owner, minlength=len(image)), _zeros(text) + 1


def _nearest_of_equal_words(
    image: Float[Tensor, "images dim"], text: Float[Tensor, "texts dim"], relevance: Relevance
) -> Nearest:
    """Compare everything with everything: any caption may be right."""
    of_image = image.new_full((len(image),), -torch.inf)
    of_text = text.new_full((len(text),), -torch.inf)
    right_of_image, right_of_text = _zeros(image), _zeros(text)
    for images, texts, cosine, right in _blocks(image, text, relevance):
        own = cosine.masked_fill(~right, -torch.inf)
        of_image[images] = torch.maximum(of_image[images], own.amax(dim=1))
        of_text[texts] = torch.maximum(of_text[texts], own.amax(dim=0))
        right_of_image[images] += right.sum(dim=1)
        right_of_text[texts] += right.sum(dim=0)
    return of_image, of_text, right_of_image, right_of_text


def _blocks(
    image: Float[Tensor, "images dim"], text: Float[Tensor, "texts dim"], relevance: Relevance
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield blocks of images and of texts, the cosines between them, and which pairs are right."""
    side = max(1, int(COSINES_AT_ONCE**0.5))
    width = min(len(text), max(side, COSINES_AT_ONCE // max(len(image), 1)))
    height = max(1, COSINES_AT_ONCE // max(width, 1))
    for row in range(0, len(image), height):
        images = slice(row, min(row + height, len(image)))
        for column in range(0, len(text), width):
            texts = slice(column, min(column + width, len(text)))
            yield images, texts, image[images] @ text[texts].T, relevance.right(images, texts)


def _zeros(items: Tensor) -> Int64[Tensor, "items"]:
    return torch.zeros(len(items), dtype=torch.int64, device=items.device)


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
