"""The losses against their definitions, written densely in float64, and their gradients."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from align.loss import Block, LossOptions, contrastive_loss
from tests.pairs import (
    CASES,
    DIM,
    FIELDS,
    IMAGES,
    Kind,
    dense,
    embeddings,
    inputs,
    pairs,
    pairs_of,
)


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

    assert torch.autograd.gradcheck(loss, inputs(), fast_mode=True)


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
