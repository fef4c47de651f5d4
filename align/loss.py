"""The contrastive losses, block by block: no matrix of all logits is ever held.

Both losses form their gradients in the forward pass, since a block of logits is at hand only once.
What is kept for the backward pass is the size of the embeddings. Over several processes every image
meets the texts of all of them, which travel round a ring together with their gradients.

Reference:
    Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343. Several
    positives: Zhang et al. 2025, arXiv:2412.04616. Softmax: Radford et al. 2021, arXiv:2103.00020,
    with several positives as L_out of Khosla et al. 2020, arXiv:2004.11362, equation 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from align.processes import Ring, map_tensors

TEXTS_PER_ROW = 4  # a block is wide: the sums over images then cost little
MASKED = -1e4  # added to the logits of a text that takes no part: its softmax is 0, and finite
ALONE = Ring()


@dataclass(frozen=True)
class Pairs:
    """Which texts are positives of which images, and how much each text counts.

    Texts are numbered image by image: text i·C + c is caption c of image i, which has C of them.
    """

    fields: Int64[Tensor, "batch captions"]
    """Caption field of each text, as in `align.loader.Batch`."""
    weights: Float[Tensor, "batch captions"]
    """Weight of each text in the loss; 0 leaves it out, as a positive and as a negative."""
    caption_ids: Int64[Tensor, "batch captions"] | None
    """Equal where captions are the same string; None: only an image's own texts are positives."""

    def __len__(self) -> int:
        """Images."""
        return len(self.weights)


@dataclass(frozen=True)
class Block:
    """A part of the matrix of all logits: some images against the texts of some images."""

    images: Pairs
    """Of this process."""
    texts: Pairs
    """Of the same process or of another one."""
    rows: slice
    """Images of the block, numbered within their process."""
    columns: slice
    """Images whose texts are in the block, numbered within theirs."""
    shift: int = 0
    """Index of the first image of the texts' process minus that of ours: text j belongs to our
    image j // captions + shift."""

    @property
    def weights(self) -> Float[Tensor, "texts"]:
        """Weights of the texts of this block."""
        return self.texts.weights[self.columns].flatten()

    def positives(self) -> Bool[Tensor, "rows texts"]:
        """Return the positives as a matrix."""
        captions, device = self.images.weights.shape[1], self.images.weights.device
        if self.images.caption_ids is None or self.texts.caption_ids is None:
            owners = torch.arange(self.columns.start, self.columns.stop, device=device) + self.shift
            images = torch.arange(self.rows.start, self.rows.stop, device=device)
            return owners.repeat_interleave(captions) == images[:, None]
        ids, used = self.images.caption_ids[self.rows], self.images.weights[self.rows] > 0
        others = self.texts.caption_ids[self.columns].flatten()
        matrix = torch.zeros(len(ids), len(others), dtype=torch.bool, device=device)
        for caption in range(captions):
            matrix |= (ids[:, caption, None] == others) & used[:, caption, None]
        return matrix

    def negate_positives(self, block: Float[Tensor, "rows texts"]) -> None:
        """Change the sign of the positives in a matrix of this block.

        With the sign of positives changed, every pair is a negative: the loss of a positive of
        logit s is that of a negative of logit −s.
        """
        if self.images.caption_ids is None:  # a diagonal: touch these few entries only
            by_image = block.view(len(block), -1, self.images.weights.shape[1])
            offset = self.rows.start - self.columns.start - self.shift
            if -len(block) < offset < by_image.shape[1]:
                by_image.diagonal(offset=offset, dim1=0, dim2=1).neg_()
        else:
            block.mul_(self.positives().to(torch.int8).mul_(-2).add_(1))


@dataclass(frozen=True)
class LossOptions:
    """What is summed, over what it is divided, and how much is held at once."""

    kind: Literal["sigmoid", "infonce"] = "sigmoid"
    normalise: Literal["image", "pair"] = "image"
    block_rows: int = 1024
    """Images per block, which has up to `TEXTS_PER_ROW` times as many texts."""


def contrastive_loss(  # noqa: PLR0913 - the terms of one formula
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch captions dim"],
    *,
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    pairs: Pairs,
    options: LossOptions,
    ring: Ring = ALONE,
) -> Float[Tensor, ""]:
    """Score every image against every text, s = exp(log_scale)·cos(image, text) + bias.

    `sigmoid`: −(1/N) Σ_i [ Σ_{j∈P(i)} w_j log σ(s_ij) + Σ_{j∉P(i)} w_j log σ(−s_ij) ], over N
    images and all texts of the batch. With `normalise = "pair"` the sum is divided by the number of
    pairs that take part (N times the texts of a weight above 0) instead of by N.

    `infonce`: half of the mean over images of −Σ_{j∈P(i)} w_j log softmax_j(s_ij) / Σ_{j∈P(i)} w_j,
    and half of the mean, weighted by w_j, over texts of −Σ_{i: j∈P(i)} log softmax_i(s_ij) / their
    number. Texts of weight 0 are in no softmax, images without a positive in no mean; the bias
    cancels; `normalise` does not matter.

    Args:
        image: Image embeddings, of any length; normalised here.
        text: Text embeddings, as many per image; normalised here.
        log_scale: Natural logarithm of the inverse temperature.
        bias: Added to every logit.
        pairs: The positives and the weights of the texts.
        options: See `align.config.LossConfig`.
        ring: The processes that hold a share of the batch each, all of one size; the batch of the
            formulas is all of them together.

    Returns:
        The loss in nats, per image, pair or decision as said above, the same on every process. The
        gradients of the embeddings are complete; those of `log_scale` and `bias` are this process'
        part, so that the sum over the processes is the gradient of every weight alike.
    """
    with torch.autocast(image.device.type, enabled=False):  # logits need more bits than bfloat16
        image = F.normalize(image.to(log_scale.dtype), dim=-1)
        text = F.normalize(text.to(log_scale.dtype), dim=-1)
        function = _Sigmoid if options.kind == "sigmoid" else _InfoNCE
        loss: Tensor = function.apply(  # type: ignore[no-untyped-call]
            image, text, log_scale, bias, _Matrix(pairs, options, ring)
        )
    return loss


@dataclass(frozen=True)
class _Texts:
    """Texts of one process, as they travel to the images of the others."""

    embeddings: Float[Tensor, "images captions dim"]
    pairs: Pairs


@dataclass(frozen=True)
class _Gradient:
    """Gradient of the texts of one process, to which the images of all processes add."""

    embeddings: Float[Tensor, "images captions dim"]


T = TypeVar("T")
Texts = TypeVar("Texts", bound=_Texts)
Sums = TypeVar("Sums")


@dataclass(frozen=True)
class _Matrix:
    """The logits of our images against the texts of all processes."""

    pairs: Pairs
    options: LossOptions
    ring: Ring

    def blocks(self, texts: Texts, sums: Sums) -> Iterator[tuple[Block, Texts, Sums]]:
        """Yield every block, with its part of the texts and of what is summed for each of them."""
        size, captions = self.options.block_rows, self.pairs.weights.shape[1]
        width = max(1, TEXTS_PER_ROW * size // captions)
        for owner, theirs, their_sums in self.ring.tour(texts, sums):
            shift = (owner - self.ring.rank) * len(self.pairs)
            for rows in slices(len(self.pairs), size):
                for columns in slices(len(self.pairs), width):
                    block = Block(self.pairs, theirs.pairs, rows, columns, shift)
                    yield block, _at(theirs, columns), _at(their_sums, columns)


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut `count` rows into slices of `size`; the last may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _at(tensors: T, part: slice) -> T:
    return map_tensors(tensors, lambda each: each[part])


class _FormsGradients(torch.autograd.Function):
    """Has saved in its forward pass the gradients of all inputs but the last."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * gradient for saved in ctx.saved_tensors), None


class _Sigmoid(_FormsGradients):
    """The sigmoid loss over normalised embeddings."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch captions dim"],
        log_scale: Float[Tensor, ""],
        bias: Float[Tensor, ""],
        matrix: _Matrix,
    ) -> Float[Tensor, ""]:
        scale, ring = log_scale.exp(), matrix.ring
        image_gradient, text_gradient = torch.zeros_like(image), torch.zeros_like(text)
        loss, bias_gradient = image.new_zeros(()), torch.zeros_like(bias)
        for block, texts, sums in matrix.blocks(
            _Texts(text, matrix.pairs), _Gradient(text_gradient)
        ):
            rows, columns = image[block.rows], texts.embeddings.flatten(0, 1)
            weights = block.weights.to(image.dtype)
            logits = torch.addmm(bias, rows * scale, columns.T)
            block.negate_positives(logits)
            loss += F.softplus(logits).sum(dim=0) @ weights
            error = logits.sigmoid_()  # of a negative: the derivative of its loss
            block.negate_positives(error)
            error *= weights
            bias_gradient += error.sum()
            image_gradient[block.rows].addmm_(error, columns)
            sums.embeddings.flatten(0, 1).addmm_(error.T, rows)
        divisor = image.new_full((), len(image) * ring.size)
        if matrix.options.normalise == "pair":
            divisor *= ring.sum((matrix.pairs.weights > 0).sum())
        image_gradient *= scale / divisor
        text_gradient *= scale / divisor
        scale_gradient = (image * image_gradient).sum()  # d/d log t = Σ (t·cos)·error
        ctx.save_for_backward(
            image_gradient, text_gradient, scale_gradient, bias_gradient / divisor
        )
        return ring.sum(loss) / divisor


@dataclass(frozen=True)
class _Choices:
    """One softmax for each image over all texts, or for each text over all images."""

    log_denominator: Float[Tensor, "*items"]
    weight: Float[Tensor, "*items"]
    """In the loss."""
    share: Float[Tensor, "*items"]
    """The weight, divided by what all positives of the item weigh together."""


@dataclass(frozen=True)
class _TextsWithChoices(_Texts):
    choices: _Choices


@dataclass(frozen=True)
class _Denominators:
    """What the images of all processes add up for each text of one process."""

    log_denominator: Float[Tensor, "images captions"]
    positives: Float[Tensor, "images captions"]


class _InfoNCE(_FormsGradients):
    """The softmax loss over normalised embeddings, in two passes over the blocks of logits.

    The first pass finds the denominators, the second forms the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch captions dim"],
        log_scale: Float[Tensor, ""],
        bias: Float[Tensor, ""],
        matrix: _Matrix,
    ) -> Float[Tensor, ""]:
        scale = log_scale.exp()
        of_images, of_texts = _denominators(image, text, scale, matrix)
        image_gradient, text_gradient = torch.zeros_like(image), torch.zeros_like(text)
        loss = (of_images.log_denominator * of_images.weight).sum()
        loss += (of_texts.log_denominator * of_texts.weight).sum()
        travelling = _TextsWithChoices(text, matrix.pairs, of_texts)
        for block, texts, sums in matrix.blocks(travelling, _Gradient(text_gradient)):
            rows, columns = image[block.rows], texts.embeddings.flatten(0, 1)
            ours = map_tensors(_at(of_images, block.rows), lambda each: each[:, None])
            theirs = map_tensors(texts.choices, torch.flatten)
            logits = torch.addmm(_mask(block, image.dtype), rows * scale, columns.T)
            positives = ours.share * block.weights.to(image.dtype)
            positives += theirs.share
            positives *= block.positives()
            loss -= (logits * positives).sum()
            error = torch.exp(logits - ours.log_denominator)
            over_images = torch.exp(logits - theirs.log_denominator)
            error *= ours.weight
            error.addcmul_(over_images, theirs.weight)
            error -= positives
            image_gradient[block.rows].addmm_(error, columns)
            sums.embeddings.flatten(0, 1).addmm_(error.T, rows)
        image_gradient *= scale
        text_gradient *= scale
        scale_gradient = (image * image_gradient).sum()
        ctx.save_for_backward(image_gradient, text_gradient, scale_gradient, torch.zeros_like(bias))
        return matrix.ring.sum(loss)


def _mask(block: Block, dtype: torch.dtype) -> Float[Tensor, "texts"]:
    return torch.where(block.weights > 0, 0.0, MASKED).to(dtype)


def _denominators(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch captions dim"],
    scale: Float[Tensor, ""],
    matrix: _Matrix,
) -> tuple[_Choices, _Choices]:
    """First pass: the softmaxes of our images, and those of our texts."""
    weights = matrix.pairs.weights.to(image.dtype)
    log_denominator = torch.full_like(image[:, 0], -torch.inf)
    weight_of_positives = torch.zeros_like(log_denominator)
    of_texts = _Denominators(torch.full_like(weights, -torch.inf), torch.zeros_like(weights))
    for block, texts, sums in matrix.blocks(_Texts(text, matrix.pairs), of_texts):
        rows, columns = block.rows, texts.embeddings.flatten(0, 1)
        logits = torch.addmm(_mask(block, image.dtype), image[rows] * scale, columns.T)
        log_denominator[rows] = torch.logaddexp(log_denominator[rows], logits.logsumexp(dim=1))
        over_images = logits.logsumexp(dim=0).view_as(sums.log_denominator)
        sums.log_denominator.copy_(torch.logaddexp(sums.log_denominator, over_images))
        positives = block.positives().to(image.dtype)
        weight_of_positives[rows] += positives @ block.weights.to(image.dtype)
        sums.positives.add_(positives.sum(dim=0).view_as(sums.positives))
    has_positive = (weight_of_positives > 0).to(image.dtype)
    image_weight = has_positive / (2 * matrix.ring.sum(has_positive.sum()))
    text_weight = weights / (2 * matrix.ring.sum(weights.sum()))
    share = image_weight / torch.where(weight_of_positives > 0, weight_of_positives, 1.0)
    return (
        _Choices(log_denominator, image_weight, share),
        _Choices(
            of_texts.log_denominator, text_weight, text_weight / of_texts.positives.clamp(min=1)
        ),
    )
