"""The heads: their form, and that their shortcuts change nothing."""

import inspect
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from align.config import HeadConfig
from align.heads import (
    HEADS,
    AlignmentModel,
    GLUHead,
    GLULayer,
    LinearHead,
    StarHead,
    build_head,
    build_model,
)
from align.heads import __file__ as heads_file
from tests import tiny


def model(kind: str = "glu", **settings: Any) -> AlignmentModel:
    torch.manual_seed(0)
    config = HeadConfig.model_validate({"kind": kind, "dim": 6, "depth": 3, **settings})
    return build_model(dict(config), image_dim=5, text_dim=9)


def test_the_settings_know_every_kind_and_everything_that_a_kind_takes() -> None:
    assert set(get_args(HeadConfig.model_fields["kind"].annotation)) == set(HEADS)
    for head in HEADS.values():
        kinds = (inspect.Parameter.KEYWORD_ONLY,)
        named = [p.name for p in inspect.signature(head).parameters.values() if p.kind in kinds]
        assert set(named) <= set(HeadConfig.model_fields), head


def test_a_kind_that_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"no head of kind 'maxout'. One of .*'glu'"):
        build_head(5, kind="maxout", dim=6)


def test_heads_py_alone_builds_every_kind_with_the_same_result(tmp_path: Path) -> None:
    """As beside the weights of an export: in a process that sees nothing else of ours."""
    features = torch.randn(4, 5)
    given, expected = [], []
    for kind in tiny.TRAINED_HEADS:
        heads = model(kind, depth=2).eval()
        settings = HeadConfig.model_validate({"kind": kind, "dim": 6, "depth": 2}).model_dump()
        given.append((settings, heads.state_dict(), features))
        expected.append(heads.embed_image(features).detach())
    torch.save(given, tmp_path / "given.pt")
    shutil.copy(heads_file, tmp_path / "heads.py")
    code = (
        "import sys, torch; from heads import build_model\n"
        "found = []\n"
        "for settings, weights, features in torch.load('given.pt'):\n"
        "    model = build_model(settings, image_dim=5, text_dim=9)\n"
        "    model.load_state_dict(weights)\n"
        "    found.append(model.eval().embed_image(features).detach())\n"
        "torch.save(found, 'found.pt')\n"
        "assert not {'align', 'features', 'pydantic', 'jaxtyping'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert all(map(torch.equal, torch.load(tmp_path / "found.pt"), expected))


@pytest.mark.parametrize("kind", tiny.TRAINED_HEADS)
def test_both_modalities_come_to_the_shared_space_from_float16_features(kind: str) -> None:
    heads = model(kind)
    assert heads.embed_image(torch.randn(4, 5).half()).shape == (4, 6)
    assert heads.embed_text(torch.randn(7, 9).half()).shape == (7, 6)


def test_a_layer_is_its_formula() -> None:
    layer = GLULayer(4, 4, first=False, dropout=0.0)
    x = torch.randn(3, 4)
    w1, w2 = layer.gated.weight.chunk(2)
    b1, b2 = layer.gated.bias.chunk(2)
    normal = layer.norm(x)
    expected = x + (normal @ w1.T + b1) * torch.sigmoid(normal @ w2.T + b2)
    torch.testing.assert_close(layer(x), expected)


def test_the_preset_has_eight_layers_each_with_a_norm_and_a_residual() -> None:
    head = GLUHead(1024, dim=768, depth=8)
    layers = [layer for layer in head.layers if isinstance(layer, GLULayer)]
    assert len(layers) == 8
    assert layers[0].skip is not None
    assert all(layer.skip is None for layer in layers[1:])
    assert all(isinstance(layer.norm, nn.LayerNorm) for layer in layers)


def test_width_is_the_hidden_length_only() -> None:
    head = GLUHead(5, dim=6, depth=3, width=11)
    sizes = [layer.gated.out_features for layer in head.layers if isinstance(layer, GLULayer)]
    assert sizes == [22, 22, 12]


@pytest.mark.parametrize("kind", [StarHead, LinearHead])
def test_the_folded_norm_has_the_gradients_of_the_plain_one(
    kind: type[StarHead] | type[LinearHead],
) -> None:
    torch.manual_seed(0)
    head = kind(5, dim=3, expansion=4).double()
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    x = torch.randn(8, 5, dtype=torch.float64)
    normal = F.layer_norm(x, (5,), head.norm.weight, head.norm.bias)
    if isinstance(head, StarHead):
        plain = head.g(F.relu6(head.f1(normal)) * head.f2(normal))
    else:
        plain = head.linear(normal)
    weights = list(head.parameters())
    expected = torch.autograd.grad(plain.square().sum(), weights)
    found = torch.autograd.grad(head(x).square().sum(), weights)
    torch.testing.assert_close(head(x), plain)
    torch.testing.assert_close(found, expected)


def test_star_values_are_clamped_as_in_the_released_code() -> None:
    head = StarHead(2, dim=1, expansion=1)
    with torch.no_grad():
        head.f1.weight.zero_()
        head.f1.bias.fill_(1e6)  # the gate is 6 at most
        head.f2.weight.zero_()
        head.f2.bias.fill_(1e6)  # the value 1000
        head.g.weight.fill_(1.0)
        head.g.bias.zero_()
    assert head(torch.randn(1, 2)).item() == pytest.approx(2 * 6 * 1000)


def test_dropout_acts_in_training_only() -> None:
    heads = model("glu").train()
    dropped = model(dropout=0.5)
    x = torch.randn(4, 5)
    assert torch.equal(heads.embed_image(x), heads.embed_image(x))
    assert not torch.equal(dropped.embed_image(x), dropped.embed_image(x))
    dropped.eval()
    assert torch.equal(dropped.embed_image(x), dropped.embed_image(x))


def test_the_scale_never_exceeds_a_hundred() -> None:
    heads = model()
    with torch.no_grad():
        heads.log_scale.fill_(9.0)
    heads.clamp_scale()
    assert heads.log_scale.exp().item() == pytest.approx(100)
    heads.log_scale.data.fill_(-3.0)
    heads.clamp_scale()
    assert heads.log_scale.item() == -3.0


def test_scale_and_bias_begin_where_the_settings_say() -> None:
    head = {"kind": "linear", "dim": 6}
    heads = build_model(head, image_dim=5, text_dim=9, initial_scale=20.0, initial_bias=-7.0)
    assert heads.log_scale.item() == pytest.approx(math.log(20))
    assert heads.bias.item() == -7


def test_without_a_head_features_are_embeddings() -> None:
    features = torch.randn(4, 5)
    heads = build_model({"kind": "none", "dim": 5}, image_dim=5, text_dim=5)
    assert torch.equal(heads.embed_image(features), features)
    with pytest.raises(ValueError, match=r"align.head.dim is 6, .* Set align.head.dim = 5"):
        build_model({"kind": "none", "dim": 6}, image_dim=5, text_dim=6)
