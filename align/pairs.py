"""Which texts are positives of which images, whole or in the blocks that a loss goes through."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Which texts are positives of which images, and how much each text counts.

    Texts are numbered image by image: text i·F + f is caption field f of image i.
    """

    fields: int
    weights: Float[Tensor, "texts"]
    """Weight of each text in the loss; 0 leaves it out, as a positive and as a negative."""
    caption_ids: Int64[Tensor, "batch fields"] | None
    """Equal where captions are the same string; None: only an image's own texts are positives."""

    def positives(self, start: int, stop: int) -> Bool[Tensor, "rows texts"]:
        """Return the positives of images `start` to `stop` as a matrix."""
        everything = slice(0, len(self.weights))
        return Block(self, self, slice(start, stop), everything).positives()

    def tensors(self) -> list[Tensor]:
        """Return what another process needs to know of these texts."""
        return [self.weights] if self.caption_ids is None else [self.weights, self.caption_ids]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Pairs":
        """Return the pairs of another process from its `tensors`."""
        weights, *ids = tensors
        return Pairs(self.fields, weights, ids[0] if ids else None)


@dataclass(frozen=True)
class Block:
    """A part of the matrix of all logits: some images against some texts, maybe of another process.

    The texts are all those of some images.
    """

    images: Pairs
    texts: Pairs
    rows: slice
    """Images, numbered within their process."""
    columns: slice
    """Texts, numbered within theirs."""
    shift: int = 0
    """By how many images those of the texts' process come after ours."""

    @property
    def weights(self) -> Float[Tensor, "texts"]:
        """Weights of the texts of this block."""
        return self.texts.weights[self.columns]

    def positives(self) -> Bool[Tensor, "rows texts"]:
        """Return the positives as a matrix."""
        weights, fields = self.images.weights, self.images.fields
        if self.images.caption_ids is None or self.texts.caption_ids is None:
            texts = torch.arange(self.columns.start, self.columns.stop, device=weights.device)
            images = torch.arange(self.rows.start, self.rows.stop, device=weights.device)
            return texts // fields + self.shift == images[:, None]
        ids, used = self.images.caption_ids[self.rows], weights.view(-1, fields)[self.rows] > 0
        others = self.texts.caption_ids.flatten()[self.columns]
        matrix = torch.zeros(len(ids), len(others), dtype=torch.bool, device=ids.device)
        for field in range(fields):
            matrix |= (ids[:, field, None] == others) & used[:, field, None]
        return matrix

    def negate_positives(self, block: Float[Tensor, "rows texts"]) -> None:
        """Change the sign of the positives in a matrix of this block.

        With the sign of positives changed, every pair is a negative: the loss of a positive of
        logit s is that of a negative of logit −s.
        """
        if self.images.caption_ids is None:  # a diagonal: touch these few entries only
            fields = self.images.fields
            by_image = block.view(len(block), -1, fields)
            offset = self.rows.start - self.columns.start // fields - self.shift
            if -len(block) < offset < by_image.shape[1]:
                by_image.diagonal(offset=offset, dim1=0, dim2=1).neg_()
        else:
            block.mul_(self.positives().to(torch.int8).mul_(-2).add_(1))


def blocks(images: Pairs, texts: Pairs, *, shift: int, rows: int) -> Iterator[Block]:
    """Cut the matrix of all images against all texts of a process into blocks.

    Args:
        images: Those of this process.
        texts: Those of the same or of another one.
        shift: By how many images those of `texts` come after those of `images`.
        rows: Images per block; it has up to `TEXTS_PER_ROW` times as many texts.
    """
    fields = images.fields
    columns = max(1, TEXTS_PER_ROW * rows // fields) * fields
    for start in range(0, len(images.weights) // fields, rows):
        stop = min(start + rows, len(images.weights) // fields)
        for first in range(0, len(texts.weights), columns):
            last = min(first + columns, len(texts.weights))
            yield Block(images, texts, slice(start, stop), slice(first, last), shift)


TEXTS_PER_ROW = 4  # a block is wide: the sums over images then cost little
