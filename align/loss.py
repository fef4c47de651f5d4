"""The contrastive losses, block by block: no matrix of all logits is ever held.

Both losses form their gradients in the forward pass, since a block of logits is at hand only once.
What is kept for the backward pass is the size of the embeddings.

Reference:
    Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343. Several
    positives: Zhang et al. 2025, arXiv:2412.04616. Softmax: Radford et al. 2021, arXiv:2103.00020,
    with several positives as L_out of Khosla et al. 2020, arXiv:2004.11362, equation 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEFT_OUT = -1e4  # added to the logits of a text that takes no part: its softmax is 0, and finite


@dataclass(frozen=True)
class LossOptions:
    """What is summed, over what it is divided, and how much is held at once."""

    kind: Literal["sigmoid", "infonce"] = "sigmoid"
    normalise: Literal["image", "pair"] = "image"
    block_rows: int = 1024


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
        texts = len(self.weights)
        if self.caption_ids is None:
            owner = torch.arange(texts, device=self.weights.device) // self.fields
            images = torch.arange(start, stop, device=self.weights.device)
            return owner == images[:, None]
        ids, used = self.caption_ids, (self.weights > 0).view(-1, self.fields)
        matrix = torch.zeros(stop - start, texts, dtype=torch.bool, device=ids.device)
        for field in range(self.fields):
            same = ids[start:stop, field, None] == ids.view(1, -1)
            matrix |= same & used[start:stop, field, None]
        return matrix

    def negate_positives(self, block: Float[Tensor, "rows texts"], start: int) -> None:
        """Change the sign of the positives in a block of the matrix that begins at image `start`.

        With the sign of positives changed, every pair is a negative: the loss of a positive of
        logit s is that of a negative of logit −s.
        """
        if self.caption_ids is None:  # a diagonal: touch these few entries only
            by_image = block.view(len(block), -1, self.fields)
            by_image.diagonal(offset=start, dim1=0, dim2=1).neg_()
        else:
            matrix = self.positives(start, start + len(block))
            block.mul_(matrix.to(torch.int8).mul_(-2).add_(1))


def contrastive_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch fields dim"],
    *,
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    pairs: Pairs,
    options: LossOptions,
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

    Returns:
        The loss in nats, per image, pair or decision as said above.
    """
    with torch.autocast(image.device.type, enabled=False):  # logits need more bits than bfloat16
        image = F.normalize(image.to(log_scale.dtype), dim=-1)
        text = F.normalize(text.to(log_scale.dtype).flatten(0, 1), dim=-1)
        function = _Sigmoid if options.kind == "sigmoid" else _InfoNCE
        loss: Tensor = function.apply(  # type: ignore[no-untyped-call]
            image, text, log_scale, bias, (pairs, options)
        )
    return loss


def _blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


class _Sigmoid(torch.autograd.Function):
    """The sigmoid loss over normalised embeddings."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "texts dim"],
        log_scale: Float[Tensor, ""],
        bias: Float[Tensor, ""],
        terms: tuple[Pairs, LossOptions],
    ) -> Float[Tensor, ""]:
        pairs, options = terms
        scale, weights = log_scale.exp(), pairs.weights.to(image.dtype)
        weighted = text * weights[:, None]
        image_gradient, text_gradient = torch.empty_like(image), torch.zeros_like(text)
        per_text, errors = torch.zeros_like(weights), torch.zeros_like(weights)
        for start, stop in _blocks(len(image), options.block_rows):
            rows = image[start:stop]
            logits = torch.addmm(bias, rows * scale, text.T)
            pairs.negate_positives(logits, start)
            per_text += F.softplus(logits).sum(dim=0)
            error = logits.sigmoid_()  # of a negative: the derivative of its loss
            pairs.negate_positives(error, start)
            errors += error.sum(dim=0)
            torch.mm(error, weighted, out=image_gradient[start:stop])
            text_gradient.addmm_(error.T, rows)
        divisor = len(image) * (1 if options.normalise == "image" else (weights > 0).sum())
        image_gradient *= scale / divisor
        text_gradient *= weights[:, None] * (scale / divisor)
        scale_gradient = (image * image_gradient).sum()  # d/d log t = Σ (t·cos)·error
        bias_gradient = (errors * weights).sum() / divisor
        ctx.save_for_backward(image_gradient, text_gradient, scale_gradient, bias_gradient)
        return (per_text * weights).sum() / divisor

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
        terms: tuple[Pairs, LossOptions],
    ) -> Float[Tensor, ""]:
        pairs, options = terms
        softmax = _softmax_terms(image, text, log_scale, pairs, options)
        image_gradient, text_gradient = torch.empty_like(image), torch.zeros_like(text)
        loss = (softmax.per_image * softmax.image_weights).sum()
        loss += (softmax.per_text * softmax.text_weights).sum()
        for start, stop in _blocks(len(image), options.block_rows):
            rows = image[start:stop]
            logits = softmax.logits(rows)
            positives = softmax.positive_weights(start, stop)
            loss -= (logits * positives).sum()
            error = softmax.probabilities(logits, start, stop) - positives
            torch.mm(error, text, out=image_gradient[start:stop])
            text_gradient.addmm_(error.T, rows)
        image_gradient *= softmax.scale
        text_gradient *= softmax.scale
        scale_gradient = (image * image_gradient).sum()
        ctx.save_for_backward(image_gradient, text_gradient, scale_gradient, torch.zeros_like(bias))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * gradient for saved in ctx.saved_tensors), None


@dataclass(frozen=True)
class _Softmax:
    """The denominators of both directions, and the weights of images and texts in the loss."""

    text: Float[Tensor, "texts dim"]
    scale: Float[Tensor, ""]
    left_out: Float[Tensor, "texts"]
    pairs: Pairs
    per_image: Float[Tensor, "batch"]
    per_text: Float[Tensor, "texts"]
    image_weights: Float[Tensor, "batch"]
    text_weights: Float[Tensor, "texts"]
    weight_of_positives: Float[Tensor, "batch"]
    images_of_text: Float[Tensor, "texts"]

    def logits(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows texts"]:
        return torch.addmm(self.left_out, rows * self.scale, self.text.T)

    def positive_weights(self, start: int, stop: int) -> Float[Tensor, "rows texts"]:
        share = self.image_weights[start:stop] / self.weight_of_positives[start:stop]
        weights = share[:, None] * self.pairs.weights.to(share.dtype)
        weights += self.text_weights / self.images_of_text
        return weights.mul_(self.pairs.positives(start, stop))

    def probabilities(
        self, logits: Float[Tensor, "rows texts"], start: int, stop: int
    ) -> Float[Tensor, "rows texts"]:
        over_texts = torch.exp(logits - self.per_image[start:stop, None])
        over_images = torch.exp(logits - self.per_text)
        over_texts *= self.image_weights[start:stop, None]
        return over_texts.addcmul_(over_images, self.text_weights)


def _softmax_terms(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "texts dim"],
    log_scale: Float[Tensor, ""],
    pairs: Pairs,
    options: LossOptions,
) -> _Softmax:
    """First pass: the logarithms of the denominators, and what the positives of each one weigh."""
    scale, weights = log_scale.exp(), pairs.weights.to(image.dtype)
    left_out = torch.where(weights > 0, 0.0, LEFT_OUT).to(image.dtype)
    per_image, of_positives = torch.empty_like(image[:, 0]), torch.empty_like(image[:, 0])
    per_text = torch.full_like(weights, -torch.inf)
    images_of_text = torch.zeros_like(weights)
    for start, stop in _blocks(len(image), options.block_rows):
        logits = torch.addmm(left_out, image[start:stop] * scale, text.T)
        per_image[start:stop] = logits.logsumexp(dim=1)
        per_text = torch.logaddexp(per_text, logits.logsumexp(dim=0))
        positives = pairs.positives(start, stop).to(image.dtype)
        of_positives[start:stop] = positives @ weights
        images_of_text += positives.sum(dim=0)
    has_positive = (of_positives > 0).to(image.dtype)
    return _Softmax(
        text=text,
        scale=scale,
        left_out=left_out,
        pairs=pairs,
        per_image=per_image,
        per_text=per_text,
        image_weights=has_positive / (2 * has_positive.sum()),
        text_weights=weights / (2 * weights.sum()),
        weight_of_positives=torch.where(of_positives > 0, of_positives, 1.0),
        images_of_text=images_of_text.clamp(min=1),
    )
