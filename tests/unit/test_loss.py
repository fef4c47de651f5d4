"""The losses against their definitions, written densely in float64, and their gradients."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from align.loss import Block, LossOptions, Pairs, contrastive_loss
from tests.pairs import pairs_of

Kind = Literal["sigmoid", "infonce"]
IMAGES, FIELDS, DIM = 8, 2, 5
SCALE, BIAS = 6.0, -1.5


def embeddings(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(IMAGES, DIM, generator=generator, dtype=torch.float64)
    text = torch.randn(IMAGES, FIELDS, DIM, generator=generator, dtype=torch.float64)
    return image, text


def pairs(case: str) -> Pairs:
    """Pairs with or without weights of the fields, a masked text, and repeated captions."""
    weights = torch.ones(IMAGES, FIELDS, dtype=torch.float64)
    if "weights" in case:
        weights *= torch.tensor([0.5, 2.0], dtype=torch.float64)
    if "masked" in case:
        weights[2, 1] = weights[5, 0] = 0
    ids = None
    if "identical" in case:
        ids = torch.arange(IMAGES * FIELDS).view(IMAGES, FIELDS)
        ids[3, 0] = ids[1, 0]  # the same short caption
        ids[4, 1] = ids[1, 0]  # and in another field
        ids[6] = ids[6, 0]  # both captions of one image the same
        ids[5, 0] = ids[2, 1]  # two missing captions: the same empty string
    return pairs_of(weights, ids)


def is_positive(pairs: Pairs, image: int, text: int) -> bool:
    if pairs.caption_ids is None:
        return text // FIELDS == image
    own = {
        int(pairs.caption_ids[image, field])
        for field in range(FIELDS)
        if pairs.weights[image, field] > 0
    }
    return int(pairs.caption_ids.flatten()[text]) in own


def dense(
    kind: Kind,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    pairs: Pairs,
    *,
    by_pair: bool,
) -> Tensor:
    """The definition in the docstring of `contrastive_loss`, term by term."""
    image, text, log_scale, bias = given
    text = text.flatten(0, 1)
    logits = log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    weights = pairs.weights.flatten()
    used = [j for j in range(len(text)) if weights[j] > 0]
    if kind == "sigmoid":
        total = logits.new_zeros(())
        for i in range(len(image)):
            for j in used:
                sign = 1 if is_positive(pairs, i, j) else -1
                total = total - weights[j] * F.logsigmoid(sign * logits[i, j])
        return total / (len(image) * (len(used) if by_pair else 1))
    over_texts, over_images, images, weight = logits.new_zeros(()), logits.new_zeros(()), 0, 0.0
    for i in range(len(image)):
        positives = [j for j in used if is_positive(pairs, i, j)]
        if positives:
            images += 1
            log_probability = logits[i, positives] - logits[i, used].logsumexp(0)
            share = weights[positives]
            over_texts = over_texts - (share * log_probability).sum() / share.sum()
    for j in used:
        owners = [i for i in range(len(image)) if is_positive(pairs, i, j)]
        log_probability = logits[owners, j] - logits[:, j].logsumexp(0)
        over_images = over_images - weights[j] * log_probability.mean()
        weight += float(weights[j])
    return (over_texts / images + over_images / weight) / 2


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image, text = embeddings()
    scale = torch.tensor(math.log(SCALE), dtype=torch.float64)
    bias = torch.tensor(BIAS, dtype=torch.float64)
    return tuple(each.requires_grad_() for each in (image, text, scale, bias))  # type: ignore[return-value]


CASES = ["plain", "weights", "masked", "identical", "identical masked", "identical masked weights"]


@pytest.mark.parametrize("block_rows", [1, 3, 100])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kind", "normalise"), [("sigmoid", "image"), ("sigmoid", "pair"), ("infonce", "image")]
)
def test_loss_and_gradients_equal_the_dense_definition(
    kind: Kind, normalise: Literal["image", "pair"], case: str, block_rows: int
) -> None:
    image, text, scale, bias = given = inputs()
    expected = dense(kind, given, pairs(case), by_pair=normalise == "pair")
    expected_gradients = torch.autograd.grad(
        expected, given, allow_unused=True, materialize_grads=True
    )
    options = LossOptions(kind, normalise, block_rows)
    loss = contrastive_loss(
        image, text, log_scale=scale, bias=bias, pairs=pairs(case), options=options
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(torch.autograd.grad(loss, given), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["sigmoid", "infonce"])
def test_gradients_equal_finite_differences(kind: Kind) -> None:
    options = LossOptions(kind, "image", 3)

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrastive_loss(
            image, text, log_scale=scale, bias=bias, pairs=pairs("identical"), options=options
        )

    assert torch.autograd.gradcheck(loss, inputs())


def test_one_matching_pair_costs_log_two_when_its_logit_is_zero() -> None:
    pair = torch.tensor([[3.0, 4.0]])  # cosine 1, so the logit is 10 · 1 − 10 = 0
    loss = contrastive_loss(
        pair,
        pair[:, None],
        log_scale=torch.tensor(math.log(10)),
        bias=torch.tensor(-10.0),
        pairs=pairs_of(torch.ones(1, 1)),
        options=LossOptions(),
    )
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_gradient_that_comes_from_behind_scales_the_gradients() -> None:
    given = inputs()
    image, text, scale, bias = given
    loss = contrastive_loss(
        image, text, log_scale=scale, bias=bias, pairs=pairs("plain"), options=LossOptions()
    )
    once = torch.autograd.grad(loss, given, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, given)
    for small, large in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * small, large)


def test_a_masked_text_is_neither_a_positive_nor_a_negative() -> None:
    image, text, scale, bias = inputs()
    masked = pairs("masked")
    loss = contrastive_loss(
        image, text, log_scale=scale, bias=bias, pairs=masked, options=LossOptions()
    )
    (gradient,) = torch.autograd.grad(loss, text)
    rows, fields = [2, 5], [1, 0]
    torch.testing.assert_close(gradient[rows, fields], torch.zeros(2, DIM, dtype=torch.float64))
    assert (gradient[2, 0] != 0).all()


def test_under_autocast_the_logits_keep_full_precision() -> None:
    image, text = (each.float() for each in embeddings())
    scale, bias = torch.tensor(2.0), torch.tensor(-1.0)

    def loss() -> float:
        return contrastive_loss(
            image,
            text,
            log_scale=scale,
            bias=bias,
            pairs=pairs_of(torch.ones(IMAGES, FIELDS)),
            options=LossOptions(),
        ).item()

    expected = loss()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss() == expected


def test_identical_captions_are_positives_of_each_other_in_any_field() -> None:
    every, given = slice(0, IMAGES), pairs("identical")
    positives = Block(given, given, every, every).positives()
    one, three, four = 1 * FIELDS, 3 * FIELDS, 4 * FIELDS + 1
    assert positives[[1, 3, 4]][:, [one, three, four]].all()
    assert not positives[0, [one, three, four]].any()
