"""A text encoder whose layers lie on two GPUs gives what it gives on one device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from tests.text_models import any_model

TEXTS = ["a red circle", "two", "a very long sentence about a blue square and a star", "a"]
TYPES = ["qwen2", "nvembed", "bert", "mpnet"]  # packed, ours, of an encoder, and not packed


@pytest.fixture(scope="module", params=TYPES)
def folder(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    return any_model(tmp_path_factory.mktemp(request.param), request.param)


def loaded(folder: Path, device: str, **settings: Any) -> TextEncoder:
    config = TextEncoderConfig(
        model=str(folder), pooling="mean", precision="float32", tokens_per_batch=16, **settings
    )
    return load_text_encoder("x", config, torch.device(device))


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")])
def test_layers_over_two_gpus_give_the_same_vectors(folder: Path, devices: Any) -> None:
    expected = loaded(folder, "cpu")
    laid_out = loaded(folder, "cuda:0", devices=devices)
    assert laid_out.device == torch.device(devices[0])
    (layers,) = (
        each
        for each in laid_out.model.modules()
        if isinstance(each, torch.nn.ModuleList) and len(each) == 2
    )
    places = [{str(weight.device) for weight in layer.parameters()} for layer in layers]
    assert places == [{devices[0]}, {devices[1]}]
    np.testing.assert_allclose(laid_out.encode(TEXTS), expected.encode(TEXTS), atol=1e-5)
    assert laid_out.fingerprint == expected.fingerprint


def test_a_middle_layer_comes_back_from_the_gpu_it_was_computed_on(folder: Path) -> None:
    if folder.name.startswith("nvembed"):
        pytest.skip("an NV-Embed has one layer to give")
    settings: Any = {"layer": 1, "also": {"a": {"layer": 2}, "b": {"layer": 0}}}
    expected = loaded(folder, "cpu", **settings)
    laid_out = loaded(folder, "cuda:0", devices=("cuda:0", "cuda:1"), **settings)
    np.testing.assert_allclose(laid_out.encode(TEXTS), expected.encode(TEXTS), atol=1e-5)
