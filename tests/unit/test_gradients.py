"""The gradients of a batch are the same whole or in micro batches."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config import AlignConfig
from align.heads import build_model
from align.loader import Batch
from align.optimizer import Gradients
from tests import tiny

ROWS, FIELDS, IMAGE_DIM, TEXT_DIM = 12, 2, 6, 7


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    fields = torch.arange(FIELDS).repeat(ROWS, 1)
    fields[3, 1] = -1
    return Batch(
        rows=np.arange(ROWS),
        image=torch.randn(ROWS, IMAGE_DIM, generator=generator).half(),
        text=torch.randn(ROWS, FIELDS, TEXT_DIM, generator=generator).half(),
        fields=fields,
        caption_ids=torch.arange(ROWS * FIELDS).view(ROWS, FIELDS) // 3,
    )


def loss_and_gradients(
    step: int = 0, *, shift: float = 0.0, given: Batch | None = None, **settings: Any
) -> list[Tensor]:
    """The loss and its gradients by the weights, at random weights or so far from them."""
    torch.manual_seed(1)
    config = AlignConfig.model_validate({"loss": {"positives": "identical"}} | settings)
    model = build_model(
        dict(config.head),
        image_dim=IMAGE_DIM,
        text_dim=TEXT_DIM,
        initial_scale=config.loss.initial_scale,
        initial_bias=config.loss.initial_bias,
    ).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(shift)
    gradients = Gradients(model, config, ["bare", "long"], seed=0, device=torch.device("cpu"))
    loss = gradients.backward(given or batch(), step)
    return [loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("size", [1, 5, 12, 100])
@pytest.mark.parametrize("kind", tiny.TRAINED_HEADS)
@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    loss: str, kind: str, size: int
) -> None:
    settings: dict[str, Any] = {
        "head": {"kind": kind, "dim": 4, "depth": 2, "expansion": 2},
        "loss": {"kind": loss, "positives": "identical"},
    }
    whole = loss_and_gradients(**settings)
    for found, expected in zip(
        loss_and_gradients(**settings, micro_batch=size), whole, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_both_passes_over_a_micro_batch_drop_the_same_activations() -> None:
    settings: dict[str, Any] = {"head": {"dim": 4, "depth": 2, "dropout": 0.5}, "micro_batch": 4}
    _, *gradients = loss_and_gradients(**settings)
    before, after = (loss_and_gradients(shift=shift, **settings)[0] for shift in (-1e-6, 1e-6))
    slope = sum(gradient.sum().item() for gradient in gradients)  # all weights are shifted alike
    assert (after - before).item() / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_a_field_without_weight_and_a_missing_caption_take_no_part() -> None:
    weighted: dict[str, Any] = {"loss": {"positives": "own", "field_weights": {"long": 0.0}}}
    every = batch()
    alone = replace(every, text=every.text[:, :1], fields=every.fields[:, :1], caption_ids=None)
    for found, expected in zip(
        loss_and_gradients(given=replace(every, caption_ids=None), **weighted),
        loss_and_gradients(given=alone, **weighted),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_dropout_depends_on_the_step_alone() -> None:
    settings: dict[str, Any] = {"head": {"dim": 4, "depth": 2, "dropout": 0.5}}
    assert torch.equal(loss_and_gradients(3, **settings)[0], loss_and_gradients(3, **settings)[0])
    assert not torch.equal(
        loss_and_gradients(3, **settings)[0], loss_and_gradients(4, **settings)[0]
    )
