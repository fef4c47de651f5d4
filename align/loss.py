"""The contrastive losses, block by block: no matrix of all logits is ever held.

Both losses form their gradients in the forward pass, since a block of logits is at hand only once.
What is kept for the backward pass is the size of the embeddings. Over several processes every image
meets the texts of all of them, which travel round a ring together with their gradients.

Reference:
    Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343. Several
    positives: Zhang et al. 2025, arXiv:2412.04616. Softmax: Radford et al. 2021, arXiv:2103.00020,
    with several positives as L_out of Khosla et al. 2020, arXiv:2004.11362, equation 2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from align.processes import Ring


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


LEFT_OUT = -1e4  # added to the logits of a text that takes no part: its softmax is 0, and finite
ALONE = Ring()


@dataclass(frozen=True)
class LossOptions:
    """What is summed, over what it is divided, and how much is held at once."""

    kind: Literal["sigmoid", "infonce"] = "sigmoid"
    normalise: Literal["image", "pair"] = "image"
    block_rows: int = 1024


def contrastive_loss(  # noqa: PLR0913 - the terms of one formula
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch fields dim"],
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
        text: Text embeddings, one per caption field; normalised here.
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
        text = F.normalize(text.to(log_scale.dtype).flatten(0, 1), dim=-1)
        function = _Sigmoid if options.kind == "sigmoid" else _InfoNCE
        loss: Tensor = function.apply(  # type: ignore[no-untyped-call]
            image, text, log_scale, bias, _Terms(pairs, options, ring)
        )
    return loss


@dataclass(frozen=True)
class _Visit:
    """Texts of one process among the images of another."""

    block: Block
    text: Float[Tensor, "columns dim"]
    constant: list[Float[Tensor, "columns"]]
    """What was said of the texts beside the pairs."""
    changing: list[Float[Tensor, "columns *dim"]]


@dataclass(frozen=True)
class _Terms:
    """What the losses are given beside tensors that have a gradient."""

    pairs: Pairs
    options: LossOptions
    ring: Ring

    def visits(
        self,
        text: Float[Tensor, "texts dim"],
        constant: list[Float[Tensor, "texts"]],
        changing: list[Float[Tensor, "texts *dim"]],
    ) -> Iterator[_Visit]:
        """Yield every block of our images against the texts of all processes."""
        images, count = len(self.pairs.weights) // self.pairs.fields, len(constant)
        given = [text, *constant, *self.pairs.tensors()]
        for owner, here, carried in self.ring.tour(given, changing):
            texts = self.pairs.with_tensors(here[1 + count :])
            shift = (owner - self.ring.rank) * images
            rows = self.options.block_rows
            for block in blocks(self.pairs, texts, shift=shift, rows=rows):
                columns = block.columns
                constants = [each[columns] for each in here[1 : 1 + count]]
                yield _Visit(block, here[0][columns], constants, [c[columns] for c in carried])


class _Sigmoid(torch.autograd.Function):
    """The sigmoid loss over normalised embeddings."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "texts dim"],
        log_scale: Float[Tensor, ""],
        bias: Float[Tensor, ""],
        terms: _Terms,
    ) -> Float[Tensor, ""]:
        scale = log_scale.exp()
        image_gradient, text_gradient = torch.zeros_like(image), torch.zeros_like(text)
        loss, bias_gradient = torch.zeros_like(bias), torch.zeros_like(bias)
        for visit in terms.visits(text, [], [text_gradient]):
            block, rows = visit.block, image[visit.block.rows]
            weights = block.weights.to(image.dtype)
            logits = torch.addmm(bias, rows * scale, visit.text.T)
            block.negate_positives(logits)
            loss += F.softplus(logits).sum(dim=0) @ weights
            error = logits.sigmoid_()  # of a negative: the derivative of its loss
            block.negate_positives(error)
            error *= weights
            bias_gradient += error.sum()
            image_gradient[block.rows].addmm_(error, visit.text)
            visit.changing[0].addmm_(error.T, rows)
        divisor = torch.full_like(bias, len(image) * terms.ring.size)
        if terms.options.normalise == "pair":
            divisor *= terms.ring.sum((terms.pairs.weights > 0).sum())
        image_gradient *= scale / divisor
        text_gradient *= scale / divisor
        scale_gradient = (image * image_gradient).sum()  # d/d log t = Σ (t·cos)·error
        ctx.save_for_backward(
            image_gradient, text_gradient, scale_gradient, bias_gradient / divisor
        )
        return terms.ring.sum(loss) / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * gradient for saved in ctx.saved_tensors), None


class _InfoNCE(torch.autograd.Function):
    """The softmax loss over normalised embeddings, in two passes over the blocks of logits.

    The first pass finds the denominators, the second forms the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "texts dim"],
        log_scale: Float[Tensor, ""],
        bias: Float[Tensor, ""],
        terms: _Terms,
    ) -> Float[Tensor, ""]:
        scale = log_scale.exp()
        softmax = _denominators(image, text, scale, terms)
        image_gradient, text_gradient = torch.zeros_like(image), torch.zeros_like(text)
        loss = (softmax.of_image * softmax.image_weights).sum()
        loss += (softmax.of_text * softmax.text_weights).sum()
        for visit in terms.visits(text, softmax.of_texts(), [text_gradient]):
            rows = image[visit.block.rows]
            logits, positives = softmax.logits(rows * scale, visit), softmax.positives(visit)
            loss -= (logits * positives).sum()
            error = softmax.probabilities(logits, visit) - positives
            image_gradient[visit.block.rows].addmm_(error, visit.text)
            visit.changing[0].addmm_(error.T, rows)
        image_gradient *= scale
        text_gradient *= scale
        scale_gradient = (image * image_gradient).sum()
        ctx.save_for_backward(image_gradient, text_gradient, scale_gradient, torch.zeros_like(bias))
        return terms.ring.sum(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * gradient for saved in ctx.saved_tensors), None


@dataclass(frozen=True)
class _Softmax:
    """The denominators of both directions, and the weights of images and texts in the loss."""

    of_image: Float[Tensor, "batch"]
    """Logarithm of the denominator over all texts."""
    image_weights: Float[Tensor, "batch"]
    share: Float[Tensor, "batch"]
    """Weight of an image, divided by that of all its positives."""
    of_text: Float[Tensor, "texts"]
    """Logarithm of the denominator over all images."""
    text_weights: Float[Tensor, "texts"]
    text_share: Float[Tensor, "texts"]
    """Weight of a text, divided by the number of its images."""

    def of_texts(self) -> list[Float[Tensor, "texts"]]:
        """Return what the images of other processes need to know of the texts."""
        return [self.of_text, self.text_weights, self.text_share]

    def logits(
        self, scaled: Float[Tensor, "rows dim"], visit: _Visit
    ) -> Float[Tensor, "rows columns"]:
        return torch.addmm(_left_out(visit), scaled, visit.text.T)

    def positives(self, visit: _Visit) -> Float[Tensor, "rows columns"]:
        share, text_share = self.share[visit.block.rows], visit.constant[2]
        weights = share[:, None] * visit.block.weights.to(share.dtype)
        weights += text_share
        return weights.mul_(visit.block.positives())

    def probabilities(
        self, logits: Float[Tensor, "rows columns"], visit: _Visit
    ) -> Float[Tensor, "rows columns"]:
        of_text, text_weights, _ = visit.constant
        over_texts = torch.exp(logits - self.of_image[visit.block.rows, None])
        over_images = torch.exp(logits - of_text)
        over_texts *= self.image_weights[visit.block.rows, None]
        return over_texts.addcmul_(over_images, text_weights)


def _left_out(visit: _Visit) -> Float[Tensor, "columns"]:
    return torch.where(visit.block.weights > 0, 0.0, LEFT_OUT).to(visit.text.dtype)


def _denominators(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "texts dim"],
    scale: Float[Tensor, ""],
    terms: _Terms,
) -> _Softmax:
    """First pass: the logarithms of the denominators, and what the positives of each one weigh."""
    weights = terms.pairs.weights.to(image.dtype)
    of_image = torch.full_like(image[:, 0], -torch.inf)
    weight_of_positives = torch.zeros_like(of_image)
    of_text, images_of_text = torch.full_like(weights, -torch.inf), torch.zeros_like(weights)
    for visit in terms.visits(text, [], [of_text, images_of_text]):
        rows = visit.block.rows
        logits = torch.addmm(_left_out(visit), image[rows] * scale, visit.text.T)
        of_image[rows] = torch.logaddexp(of_image[rows], logits.logsumexp(dim=1))
        visit.changing[0].copy_(torch.logaddexp(visit.changing[0], logits.logsumexp(dim=0)))
        positives = visit.block.positives().to(image.dtype)
        weight_of_positives[rows] += positives @ visit.block.weights.to(image.dtype)
        visit.changing[1].add_(positives.sum(dim=0))
    has_positive = (weight_of_positives > 0).to(image.dtype)
    image_weights = has_positive / (2 * terms.ring.sum(has_positive.sum()))
    text_weights = weights / (2 * terms.ring.sum(weights.sum()))
    return _Softmax(
        of_image=of_image,
        image_weights=image_weights,
        share=image_weights / torch.where(weight_of_positives > 0, weight_of_positives, 1.0),
        of_text=of_text,
        text_weights=text_weights,
        text_share=text_weights / images_of_text.clamp(min=1),
    )
