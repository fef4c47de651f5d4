"""Outputs, losses and gradients of the released code, from its tiny checkpoints in shared/."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from align.heads import AlignmentModel
from align.loss import LossOptions, contrastive_loss
from pipeline.export.released import load_released, released_names, save_released
from tests.pairs import pairs_of

GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "sail_head_tiny"
pytestmark = pytest.mark.skipif(
    not GOLDENS.is_dir(), reason="the goldens lie in shared/, beside the checkout; they are absent"
)
KINDS: list[Literal["star", "linear"]] = ["star", "linear"]


def golden(kind: Literal["star", "linear"]) -> tuple[AlignmentModel, dict[str, Tensor]]:
    prefix = f"{kind}."
    cases = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(GOLDENS / "cases.safetensors").items()
        if name.startswith(prefix)
    }
    model, head = load_released(GOLDENS / f"head_{kind}.pt")
    assert head.kind == kind
    return model.requires_grad_(), cases


def loss_of(
    model: AlignmentModel, cases: dict[str, Tensor], texts: list[str], options: LossOptions
) -> Tensor:
    text = torch.stack([cases[name] for name in texts], dim=1)
    count, fields = text.shape[:2]
    return contrastive_loss(
        model.embed_image(cases["image"]),
        model.embed_text(text.flatten(0, 1)).view(count, fields, -1),
        log_scale=model.log_scale,
        bias=model.bias,
        pairs=pairs_of(torch.ones(count, fields)),
        options=options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_those_of_the_released_head(kind: Literal["star", "linear"]) -> None:
    model, cases = golden(kind)
    found = {
        "image_embeddings": model.embed_image(cases["image"]),
        "text_embeddings": model.embed_text(cases["text"]),
        "extra_text_embeddings": model.embed_text(cases["extra_text"]),
    }
    for name, embeddings in found.items():
        torch.testing.assert_close(embeddings, cases[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_the_released_head(kind: Literal["star", "linear"]) -> None:
    model, cases = golden(kind)
    image = torch.nn.functional.normalize(model.embed_image(cases["image"]), dim=-1)
    text = torch.nn.functional.normalize(model.embed_text(cases["text"]), dim=-1)
    logits = model.log_scale.exp() * text @ image.T + model.bias
    torch.testing.assert_close(logits, cases["logits_per_text"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("case", "texts"), [("single", ["text"]), ("multi", ["text", "extra_text"])]
)
def test_sigmoid_loss_and_gradients_equal_those_of_the_released_code(
    kind: Literal["star", "linear"], case: str, texts: list[str]
) -> None:
    model, cases = golden(kind)
    loss = loss_of(model, cases, texts, LossOptions("sigmoid", "pair", 5))
    torch.testing.assert_close(loss, cases[f"{case}.loss"][0], rtol=1e-5, atol=0)
    loss.backward()
    weights = dict(model.named_parameters())
    prefix = f"{case}.grad."
    names = [name for name in cases if name.startswith(prefix)]
    ours = released_names(kind)
    assert len(names) == len(weights)
    for name in names:
        gradient = weights[ours[name.removeprefix(prefix)]].grad
        assert gradient is not None
        torch.testing.assert_close(
            gradient.reshape(cases[name].shape), cases[name], rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_loss_equals_that_of_the_released_code(kind: Literal["star", "linear"]) -> None:
    model, cases = golden(kind)
    loss = loss_of(model, cases, ["text"], LossOptions("infonce", "image", 5))
    torch.testing.assert_close(loss, cases["infonce.loss"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_comes_back_from_the_released_layout_as_it_was(
    kind: Literal["star", "linear"], tmp_path: Path
) -> None:
    model, _ = golden(kind)
    save_released(model, kind, tmp_path / "out.pt", epoch=3)
    there = torch.load(GOLDENS / f"head_{kind}.pt", weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert back["epoch"] == 3
    assert back["state_dict"].keys() == there.keys()
    assert all(torch.equal(back["state_dict"][name], there[name]) for name in there)
