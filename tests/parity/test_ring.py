"""The losses over several processes against their definitions on the whole batch, in float64."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from align.loss import LossOptions, contrastive_loss
from align.processes import Ring
from tests.pairs import CASES, IMAGES, Kind, dense, inputs, pairs, pairs_of
from tests.processes import run_processes

SIZES = [pytest.param(size, marks=[pytest.mark.slow] * (size > 2)) for size in (1, 2, 4)]
LOSSES: list[tuple[Kind, Literal["image", "pair"]]] = [
    ("sigmoid", "image"),
    ("sigmoid", "pair"),
    ("infonce", "image"),
]
GIVEN = ("image", "text", "log_scale", "bias")


def compute_shares(folder: str) -> None:
    """In each process: loss and gradients of every case, on this process' share of the images."""
    ring = Ring.of_processes()
    count = IMAGES // ring.size
    share = slice(ring.rank * count, (ring.rank + 1) * count)
    results = {}
    for kind, normalise in LOSSES:
        for case in CASES:
            whole = pairs(case)
            ids = None if whole.caption_ids is None else whole.caption_ids[share]
            image, text, scale, bias = inputs()
            image, text = (each[share].detach().requires_grad_() for each in (image, text))
            loss = contrastive_loss(
                image,
                text,
                log_scale=scale,
                bias=bias,
                pairs=pairs_of(whole.weights[share], ids),
                options=LossOptions(kind, normalise, 3),
                ring=ring,
            )
            loss.backward()
            gradients = [each.grad for each in (image, text, scale, bias)]
            results[kind, normalise, case] = {
                "loss": loss.detach(),
                **dict(zip(GIVEN, gradients, strict=True)),
            }
    torch.save(results, Path(folder) / f"{ring.rank}.pt")


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} processes")
def shares(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[Any, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("shares")
    run_processes(request.param, "tests.parity.test_ring", "compute_shares", str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "normalise"), LOSSES)
def test_shares_of_a_batch_give_the_loss_and_gradients_of_the_whole(
    shares: list[dict[Any, dict[str, torch.Tensor]]], kind: Kind, normalise: str, case: str
) -> None:
    given = inputs()
    expected = dense(kind, given, pairs(case), by_pair=normalise == "pair")
    gradients = torch.autograd.grad(expected, given, allow_unused=True, materialize_grads=True)
    found = [share[kind, normalise, case] for share in shares]
    for share in found:
        assert share["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    for name, wanted in zip(GIVEN, gradients, strict=True):
        parts = [share[name] for share in found]
        whole = torch.cat(parts) if name in ("image", "text") else torch.stack(parts).sum(dim=0)
        torch.testing.assert_close(whole, wanted, rtol=1e-10, atol=1e-13)


def test_a_process_alone_is_its_own_ring() -> None:
    assert not dist.is_initialized()
    assert Ring.of_processes() == Ring(0, 1)
