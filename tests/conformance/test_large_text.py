"""Text encoders with layers in few bits or over several devices, beside the whole ones."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.errors import EncoderError
from tests.conformance.sentences import TEXTS, unit
from tests.text_models import any_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2", "bert", "nvembed"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    return any_model(tmp_path_factory.mktemp(request.param), request.param)


def loaded(folder: Path, **settings: Any) -> TextEncoder:
    config = TextEncoderConfig(model=str(folder), pooling="mean", **settings)
    return load_text_encoder("x", config, CPU)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float((unit(one) * unit(other)).sum(axis=1).min())


@pytest.mark.parametrize(("form", "least"), [("8bit", 0.995), ("4bit", 0.9)])
def test_layers_in_few_bits_give_nearly_the_same_vectors_and_the_store_says_so(
    folder: Path, form: Any, least: float
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole, few = loaded(folder), loaded(folder, quantise=form)
    vectors = few.encode(TEXTS)
    exact = whole.encode(TEXTS)
    assert alike(exact, vectors) > least
    assert not np.array_equal(exact, vectors)
    np.testing.assert_array_equal(vectors, loaded(folder, quantise=form).encode(TEXTS))
    assert few.fingerprint["quantised"] == f"{form}, bitsandbytes {bitsandbytes.__version__}"
    assert "quantised" not in whole.fingerprint
    layers = [each for name, each in few.model.named_modules() if re.search(r"\.\d+\.", name)]
    linear = [each for each in layers if isinstance(each, torch.nn.Linear)]
    assert linear
    assert {each.weight.dtype for each in linear} == {torch.int8 if form == "8bit" else torch.uint8}


def test_without_the_library_one_line_says_how_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EncoderError, match=r"pip install -e '\.\[quantised\]'"):
        loaded(folder, quantise="4bit")


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    for name in ("cuda:97", "gpu"):
        with pytest.raises(EncoderError, match=rf"devices of .* has '{name}'"):
            loaded(folder, devices=("cpu", name))
