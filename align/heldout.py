"""Retrieval ranks, and what they say on held-out rows, by which the best checkpoint is chosen.

The evaluation ranks with the same function.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float64, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from align.columns import Columns
from align.heads import AlignmentModel
from features.storage.rows import key_hashes

RECALL_AT = (1, 5, 10)
BLOCK_ROWS = 1024
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

    def first(self, images: int) -> "Relevance":
        """Return that of the first images alone."""
        used = self.owner < images
        words = None if self.words is None else self.words[used]
        return Relevance(images, self.owner[used], words)

    def to(self, device: torch.device | str) -> "Relevance":
        """Return it on another device."""
        words = None if self.words is None else self.words.to(device)
        return Relevance(self.images, self.owner.to(device), words)

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

    by_image: Int64[Tensor, "images"]
    """Of image queries: 0 when a right caption is nearest of all."""
    by_text: Int64[Tensor, "texts"]
    """Of caption queries: 0 when a right image is nearest of all."""
    right_texts: Int64[Tensor, "images"]
    """Captions that are right for each image."""
    right_images: Int64[Tensor, "texts"]
    """Images that are right for each caption."""


def retrieval_ranks(
    image: Float[Tensor, "images dim"],
    text: Float[Tensor, "texts dim"],
    relevance: Relevance,
    offsets: tuple[Float[Tensor, "images"], Float[Tensor, "texts"]] | None = None,
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
        offsets: What is taken off the cosines with each image, and with each caption, where it is
            not the query but searched; nothing if not given.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    taken = offsets or (image.new_zeros(len(image)), text.new_zeros(len(text)))
    nearest = _nearest_own if relevance.words is None else _nearest_of_equal_words
    best_of_image, best_of_text, right_of_image, right_of_text = nearest(
        image, text, relevance, taken
    )
    by_image, by_text = _zeros(image), _zeros(text)
    for images, texts, cosine, right in _blocks(image, text, relevance):
        # "Not lower" rather than "higher or equal", so that a NaN on either side counts.
        of_image = cosine if offsets is None else cosine - taken[1][texts]
        by_image[images] += (~(of_image < best_of_image[images, None] - TIE) & ~right).sum(dim=1)
        of_text = cosine if offsets is None else cosine - taken[0][images, None]
        by_text[texts] += (~(of_text < best_of_text[texts] - TIE) & ~right).sum(dim=0)
    return Ranks(by_image, by_text, right_of_image, right_of_text)


Nearest = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of each image and of each caption, the cosine of the nearest right item; then their numbers."""


def _nearest_own(
    image: Float[Tensor, "images dim"],
    text: Float[Tensor, "texts dim"],
    relevance: Relevance,
    taken: tuple[Float[Tensor, "images"], Float[Tensor, "texts"]],
) -> Nearest:
    """Compare each caption with its own image only."""
    owner = relevance.owner
    step = max(1, COSINES_AT_ONCE // max(image.shape[1], 1))
    parts = [
        (text[start : start + step] * image[owner[start : start + step]]).sum(dim=1)
        for start in range(0, len(text), step)
    ]
    cosine = torch.cat(parts) if parts else text.new_empty(0)
    of_image = image.new_full((len(image),), -torch.inf)
    of_image = of_image.scatter_reduce(0, owner, cosine - taken[1], "amax")
    of_text = cosine - taken[0][owner]
    return of_image, of_text, torch.bincount(owner, minlength=len(image)), _zeros(text) + 1


def _nearest_of_equal_words(
    image: Float[Tensor, "images dim"],
    text: Float[Tensor, "texts dim"],
    relevance: Relevance,
    taken: tuple[Float[Tensor, "images"], Float[Tensor, "texts"]],
) -> Nearest:
    """Compare everything with everything: any caption may be right."""
    of_image = image.new_full((len(image),), -torch.inf)
    of_text = text.new_full((len(text),), -torch.inf)
    right_of_image, right_of_text = _zeros(image), _zeros(text)
    for images, texts, cosine, right in _blocks(image, text, relevance):
        own = cosine.masked_fill(~right, -torch.inf)
        best = ((own - taken[1][texts]).amax(dim=1), (own - taken[0][images, None]).amax(dim=0))
        of_image[images] = torch.maximum(of_image[images], best[0])
        of_text[texts] = torch.maximum(of_text[texts], best[1])
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


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of one store that are scored."""

    columns: Columns
    rows: Int64[np.ndarray, "queries"]
    """In order."""
    text_ok: Bool[np.ndarray, "queries fields"]
    """Their captions that can be used."""

    def texts(self) -> Float16[np.ndarray, "queries fields dim"]:
        """Read the features of all captions."""
        return np.stack([column.rows_at(self.rows) for column in self.columns.text], axis=1)


class HeldOut:
    """The features of the held-out rows, in memory, and what is right for each of them."""

    def __init__(
        self,
        parts: Sequence[HeldOutRows],
        *,
        identical: bool,
        device: torch.device,
    ) -> None:
        """Read the rows.

        Args:
            parts: Rows of each store. One that has fewer caption fields than another is filled up
                with captions that do not count.
            identical: Whether a caption with the same words is as right as the image's own.
            device: Where the features are kept.
        """
        self.device = device
        self.dims = parts[0].columns.image.dims, parts[0].columns.text[0].dims
        fields = max(len(part.columns.text) for part in parts)
        images = [part.columns.image.rows_at(part.rows) for part in parts]
        texts = [_filled(part.texts(), fields) for part in parts]
        weights = [_filled(part.text_ok, fields).astype(np.float32) for part in parts]
        self.image = torch.from_numpy(np.concatenate(images)).to(device)
        self.text = torch.from_numpy(np.concatenate(texts)).flatten(0, 1).to(device)
        every = [_filled(_caption_ids(part.columns, part.rows), fields) for part in parts]
        ids = torch.from_numpy(np.concatenate(every)).to(device)
        used = torch.from_numpy(np.concatenate(weights)).flatten().to(device) > 0
        self.text = self.text[used]
        owner = torch.arange(len(self.image), device=device).repeat_interleave(fields)[used]
        self.alike = Relevance(len(self.image), owner, ids.flatten()[used])
        """What is right if captions with the same words are."""
        self.relevance = self.alike if identical else Relevance(len(self.image), owner)

    def __len__(self) -> int:
        return len(self.image)

    def first(self, rows: int) -> "HeldOut":
        """Return some of the rows: the first ones."""
        if rows >= len(self):
            return self
        part = copy(self)
        part.image, part.text = self.image[:rows], self.text[self.relevance.owner < rows]
        part.relevance, part.alike = self.relevance.first(rows), self.alike.first(rows)
        return part

    @torch.no_grad()
    def ranks(self, model: AlignmentModel) -> Ranks:
        """Embed the rows and rank them."""
        was_training = model.training
        model.eval()
        image = self._embed(model.embed_image, self.image)
        text = self._embed(model.embed_text, self.text)
        model.train(was_training)
        with torch.autocast(self.device.type, enabled=False):
            return retrieval_ranks(image, text, self.relevance)

    def log_ranks(self, found: Ranks) -> Float64[Tensor, "images"]:
        """Return ln(1 + rank) of each row, by which heads are compared; 0 is the best there is.

        It is the mean of that of the image and of the mean over its captions. Unlike a recall it
        is never saturated before all ranks are 0, and every row has one, so that two heads are
        compared row by row.
        """
        of_image, of_text = (each.double().log1p() for each in (found.by_image, found.by_text))
        owner = self.relevance.owner.to(of_text.device)
        sums = torch.zeros_like(of_image).index_add_(0, owner, of_text)
        return (of_image + sums / torch.bincount(owner, minlength=len(self))).cpu() / 2

    def score(self, model: AlignmentModel) -> dict[str, float]:
        """Return what `scores` does, of the embeddings of a model."""
        return self.scores(self.ranks(model))

    def scores(self, found: Ranks) -> dict[str, float]:
        """Return recall@k as fractions, each way and the mean of both ways; and `mean_recall`.

        That is the mean of recall@1, @5 and @10 (the "rsum" of the literature, over six). Beside it
        `log_rank`, the mean of `log_ranks`, and its standard error `log_rank_se`.

        An image is right if one of its captions is among the k nearest of all captions; a caption
        is right if its image is among the k nearest of all images. A wrong one that is equally
        near (to within 1e-6 of cosine) counts as nearer.
        """
        scores = {}
        for k in RECALL_AT:
            both = [(ranks < k).double().mean().item() for ranks in (found.by_image, found.by_text)]
            scores[f"recall@{k}"] = sum(both) / 2
            scores[f"recall@{k}/image_to_text"], scores[f"recall@{k}/text_to_image"] = both
        scores["mean_recall"] = sum(scores[f"recall@{k}"] for k in RECALL_AT) / len(RECALL_AT)
        logs = self.log_ranks(found)
        scores["log_rank"] = logs.mean().item()
        scores["log_rank_se"] = standard_error(logs)
        return scores

    def _embed(
        self, embed: Callable[[Tensor], Tensor], features: Float16[Tensor, "rows dim"]
    ) -> Tensor:
        blocks = [embed(block) for block in torch.split(features, BLOCK_ROWS)]
        return F.normalize(torch.cat(blocks).float(), dim=-1)


def standard_error(values: Float64[Tensor, "items"]) -> float:
    """Return the standard error of a mean; of one value alone there is none: 0."""
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0


def _caption_ids(
    columns: Columns, rows: Int64[np.ndarray, "queries"]
) -> Int64[np.ndarray, "queries fields"]:
    words = [columns.store.strings_at(f"caption/{name}", rows) for name in columns.fields]
    return np.stack([key_hashes(each, len(rows)).view(np.int64) for each in words], axis=1)


def _filled(values: Shaped[np.ndarray, "queries ..."], fields: int) -> np.ndarray:
    """Append fields of zeros until there are as many."""
    missing = fields - values.shape[1]
    return np.pad(values, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)])
