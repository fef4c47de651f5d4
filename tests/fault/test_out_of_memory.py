"""A device that runs out of memory on a batch of captions: the budget halves, the run goes on."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.encoders.packing import TokenBatch
from features.errors import EncoderError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import text_models, tiny


def give_memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every text encoder run out of memory above some tokens; returns the sizes tried."""
    forward = TextEncoder._forward
    tried: list[int] = []

    def limited(self: TextEncoder, sequences: Any) -> torch.Tensor:
        tried.append(sum(map(len, sequences)))
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, sequences)

    monkeypatch.setattr(TextEncoder, "_forward", limited)
    return tried


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_the_budget_halves_until_a_batch_fits_and_the_features_are_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model_type: str,
) -> None:
    folder = text_models.transformers_model(tmp_path, model_type)
    settings = TextEncoderConfig(model=str(folder), tokens_per_batch=1000, max_length=128)
    encoder = load_text_encoder("tiny", settings, torch.device("cpu"))
    ids = text_models.sequences(60, longest=20)
    expected = encoder.encode_tokens(ids)
    tried = give_memory_for(70, monkeypatch)
    with caplog.at_level(logging.WARNING):
        done: list[int] = []
        np.testing.assert_allclose(encoder.encode_tokens(ids, done.append), expected, atol=1e-5)
    assert sum(done) == 60
    assert "ran out of memory on" in caplog.text
    assert 35 <= encoder.tokens_per_batch <= 70
    failed = sum(tokens > 70 for tokens in tried)
    encoder.encode_tokens(ids)  # what fits is remembered
    assert sum(tokens > 70 for tokens in tried) == failed


def test_a_single_caption_that_does_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_models.nvembed(tmp_path)
    encoder = load_text_encoder("tiny", TextEncoderConfig(model=str(folder)), torch.device("cpu"))
    give_memory_for(10, monkeypatch)
    with pytest.raises(EncoderError, match=r"One caption of 11 tokens is too much .* max_length"):
        encoder.encode_tokens([[5] * 4, [5] * 11])


def test_an_extraction_goes_on_after_running_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = tiny.world(tmp_path)
    whole = FeatureStore.open(extract(load_config(str(run_file), []), StopRequest())[0])
    tried = give_memory_for(20, monkeypatch)
    other = load_config(str(run_file), [f"run.dir='{tmp_path / 'other'}'"])
    store = FeatureStore.open(extract(other, StopRequest())[0])
    assert max(tried) > 20
    for name in ("text/bert/long", "text/bert/short"):
        np.testing.assert_array_equal(store.column(name).status(), whole.column(name).status())
        np.testing.assert_allclose(
            store.column(name).read(0, store.rows).astype(np.float32),
            whole.column(name).read(0, store.rows).astype(np.float32),
            atol=2e-3,
        )


def test_the_batch_that_failed_is_the_one_that_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_models.transformers_model(tmp_path, "bert")
    settings = TextEncoderConfig(model=str(folder), tokens_per_batch=8, max_length=128)
    encoder = load_text_encoder("tiny", settings, torch.device("cpu"))
    seen: list[TokenBatch] = []
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tried = give_memory_for(4, monkeypatch)
    encoder.encode_tokens([[5] * 4, [6] * 4, [7] * 4])
    assert tried == [8, 4, 4, 4]
    assert [batch.ids.tolist() for batch in seen] == [[5] * 4, [6] * 4, [7] * 4]
