"""The gradients of a batch are the same whole or in micro batches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config import AlignConfig
from align.heads import HEADS, build_model
from align.loader import Batch
from align.optimizer import Gradients

ROWS, FIELDS, IMAGE_DIM, TEXT_DIM = 12, 2, 6, 7


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    weights = torch.ones(ROWS, FIELDS)
    weights[3, 1] = 0
    return Batch(
        rows=np.arange(ROWS),
        image=torch.randn(ROWS, IMAGE_DIM, generator=generator).half(),
        text=torch.randn(ROWS, FIELDS, TEXT_DIM, generator=generator).half(),
        weights=weights,
        caption_ids=torch.arange(ROWS * FIELDS).view(ROWS, FIELDS) // 3,
    )


def loss_and_gradients(step: int = 0, **settings: Any) -> list[Tensor]:
    torch.manual_seed(1)
    config = AlignConfig.model_validate({"loss": {"positives": "identical"}} | settings)
    model = build_model(
        dict(config.head),
        image_dim=IMAGE_DIM,
        text_dim=TEXT_DIM,
        initial_scale=config.loss.initial_scale,
        initial_bias=config.loss.initial_bias,
    ).double()
    loss = Gradients(model, config, seed=0, device=torch.device("cpu")).backward(batch(), step)
    return [loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("size", [1, 5, 12, 100])
@pytest.mark.parametrize("kind", HEADS)
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


def test_both_passes_over_a_micro_batch_drop_the_same_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = {"dim": 4, "depth": 2, "dropout": 0.5}
    original, seen = Gradients._embed, list[Tensor]()

    def embed(self: Gradients, rows: Batch, part: slice, step: int) -> tuple[Tensor, Tensor]:
        image, text = original(self, rows, part, step)
        seen.append(image.detach())
        return image, text

    monkeypatch.setattr(Gradients, "_embed", embed)
    loss_and_gradients(head=head, micro_batch=4)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)


def test_dropout_depends_on_the_step_alone() -> None:
    settings: dict[str, Any] = {"head": {"dim": 4, "depth": 2, "dropout": 0.5}}
    assert torch.equal(loss_and_gradients(3, **settings)[0], loss_and_gradients(3, **settings)[0])
    assert not torch.equal(
        loss_and_gradients(3, **settings)[0], loss_and_gradients(4, **settings)[0]
    )
