"""Captions of a batch lie behind each other without padding, and never see each other."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModel

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.encoders.packing import TokenBatch, batch_stop
from features.encoders.pretrained import PACKED_TYPES
from tests import text_models

POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
}


def loaded(folder: Path, **settings: Any) -> TextEncoder:
    about: dict[str, Any] = {"max_length": 100, "tokens_per_batch": 64, "pooling": "mean"}
    config = TextEncoderConfig(model=str(folder), **about | settings)
    return load_text_encoder("tiny", config, torch.device("cpu"))


def computed_tokens(encoder: TextEncoder, ids: list[list[int]]) -> tuple[np.ndarray, int]:
    """The features, and how many tokens went through the embedding of the model."""
    seen = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += inputs[0].numel()

    names = {"embed_tokens", "word_embeddings"}
    for name, module in encoder.model.named_modules():
        if name.rpartition(".")[2] in names:
            module.register_forward_pre_hook(count)
    return encoder.encode_tokens(ids), seen


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(PACKED_TYPES))
@pytest.mark.parametrize("pooling", sorted(POOLED))
def test_packed_captions_equal_transformers_one_by_one(
    tmp_path: Path, model_type: str, pooling: str
) -> None:
    folder = text_models.transformers_model(tmp_path, model_type)
    ids = text_models.sequences(12)
    encoder = loaded(folder, pooling=pooling, max_length=64)
    features, seen = computed_tokens(encoder, ids)
    assert not encoder.equal_lengths
    assert seen == sum(map(len, ids))
    expected = [POOLED[pooling](text_models.plain_states(folder, tokens)) for tokens in ids]
    np.testing.assert_allclose(features, torch.stack(expected), atol=2e-6)


def test_a_model_that_cannot_pack_groups_equal_lengths_without_padding(tmp_path: Path) -> None:
    folder = text_models.transformers_model(tmp_path, "mpnet")
    ids = text_models.sequences(12, longest=6)
    encoder = loaded(folder)
    features, seen = computed_tokens(encoder, ids)
    assert encoder.equal_lengths
    assert seen == sum(map(len, ids))
    expected = [text_models.plain_states(folder, tokens).mean(0) for tokens in ids]
    np.testing.assert_allclose(features, torch.stack(expected), atol=2e-6)


def test_the_models_own_pooler_sees_each_caption(tmp_path: Path) -> None:
    folder = text_models.transformers_model(tmp_path, "bert")
    ids = text_models.sequences(8, longest=6)
    features = loaded(folder, pooling="pooler").encode_tokens(ids)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([t])).pooler_output[0] for t in ids]
    np.testing.assert_allclose(features, torch.stack(expected), atol=2e-6)


@pytest.mark.parametrize(("model_type", "room"), [("bert", 200), ("roberta", 198), ("mpnet", 198)])
def test_captions_are_cut_to_what_a_model_has_positions_for(
    tmp_path: Path, model_type: str, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = text_models.transformers_model(tmp_path, model_type)
    caplog.set_level("INFO")
    encoder = loaded(folder, max_length=room + 1, tokens_per_batch=1000)
    assert encoder.fingerprint["max_length"] == room
    assert f"max_length is lowered from {room + 1} (the recipe) to {room}" in caplog.text
    assert len(encoder.tokenise(["a " * 300])[0]) == room
    assert np.isfinite(encoder.encode(["a " * 300])).all()


def test_captions_longer_than_a_sliding_window_are_not_packed(tmp_path: Path) -> None:
    folder = text_models.transformers_model(tmp_path, "mistral", sliding_window=8)
    ids = [[5, 6, 7] * 10, [8, 9] * 4]
    assert not loaded(folder, max_length=8).equal_lengths
    encoder = loaded(folder, max_length=30)
    assert encoder.equal_lengths
    expected = [text_models.plain_states(folder, tokens).mean(0) for tokens in ids]
    np.testing.assert_allclose(encoder.encode_tokens(ids), torch.stack(expected), atol=2e-6)


@pytest.mark.parametrize("model_type", ["bert", "mistral", "mpnet", "nvembed"])
def test_a_caption_has_the_same_vector_whatever_shares_its_batch(
    tmp_path: Path, model_type: str
) -> None:
    encoder = loaded(text_models.any_model(tmp_path, model_type))
    ids = text_models.sequences(30)
    alone = np.concatenate([encoder.encode_tokens([tokens]) for tokens in ids])
    for tokens_per_batch in (1, 50, 200, 10_000):
        encoder.tokens_per_batch = tokens_per_batch
        np.testing.assert_allclose(encoder.encode_tokens(ids), alone, atol=1e-5)
        np.testing.assert_allclose(encoder.encode_tokens(ids[::-1])[::-1], alone, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "mistral", "nvembed"])
def test_the_call_of_the_variable_length_kernel_asks_for_the_same_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """The kernel is CUDA's own. Here its arguments are bound to its signature and obeyed."""
    encoder = loaded(text_models.any_model(tmp_path, model_type))
    ids = text_models.sequences(12)
    expected = encoder.encode_tokens(ids)
    calls = 0

    def kernel(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        bound = inspect.signature(varlen_attn).bind(*arguments, **options)
        bound.apply_defaults()
        return attend_one_by_one(**bound.arguments)

    monkeypatch.setattr("features.encoders.packing.varlen_attn", kernel)
    monkeypatch.setattr("features.encoders.packing._has_varlen_kernel", lambda _: True)
    np.testing.assert_allclose(encoder.encode_tokens(ids), expected, atol=2e-6)
    assert calls > 0


def attend_one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, **rest: Any
) -> torch.Tensor:
    """What the documentation of `varlen_attn` says it computes, sequence by sequence."""
    assert rest["cu_seq_k"].tolist() == cu_seq_q.tolist()
    assert cu_seq_q.dtype == torch.int32
    assert rest["max_q"] == rest["max_k"] == int(cu_seq_q.diff().max())
    assert rest["enable_gqa"] or query.shape[1] == key.shape[1]
    repeats = query.shape[1] // key.shape[1]
    attended = []
    for start, stop in pairwise(cu_seq_q.tolist()):
        q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(repeats, dim=0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * rest["scale"]
        if rest["window_size"] == (-1, 0):
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        attended.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(attended)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_type", ["bert", "mistral", "nvembed"])
@pytest.mark.parametrize(("precision", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_a_gpu_gives_nearly_what_a_cpu_gives(
    tmp_path: Path, model_type: str, precision: str, error: float
) -> None:
    folder = text_models.any_model(tmp_path, model_type)
    ids = text_models.sequences(30)
    exact = loaded(folder).encode_tokens(ids)
    settings = {"model": str(folder), "max_length": 100, "precision": precision}
    settings |= {"pooling": "mean"}
    config = TextEncoderConfig.model_validate(settings)
    found = load_text_encoder("tiny", config, torch.device("cuda")).encode_tokens(ids)
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(found, axis=1)
    assert (1 - (exact * found).sum(1) / lengths).max() < error


def test_positions_starts_and_runs_of_a_batch_are_those_worked_out_by_hand() -> None:
    batch = TokenBatch.pack([[5, 6, 7], [8, 9, 5], [6]], torch.device("cpu"), first_position=2)
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 5, 6]
    assert batch.positions.tolist() == [2, 3, 4, 2, 3, 4, 2]
    assert batch.starts.tolist() == [0, 3, 6, 7]
    assert batch.runs == ((2, 3), (1, 1))


@pytest.mark.parametrize("equal_lengths", [False, True])
@pytest.mark.parametrize("budget", [1, 7, 40, 1000])
def test_batches_hold_every_caption_once_within_the_budget(
    budget: int, equal_lengths: bool
) -> None:
    lengths = sorted((len(tokens) for tokens in text_models.sequences(60)), reverse=True)
    bounds = [0]
    while bounds[-1] < len(lengths):
        stop = batch_stop(lengths, bounds[-1], budget, equal_lengths=equal_lengths)
        assert stop > bounds[-1]
        bounds.append(stop)
    for start, stop in pairwise(bounds):
        batch = lengths[start:stop]
        assert sum(batch) <= budget or len(batch) == 1
        assert not equal_lengths or len(set(batch)) == 1
    assert bounds[-1] == len(lengths)


def test_no_captions_give_no_features(tmp_path: Path) -> None:
    encoder = loaded(text_models.transformers_model(tmp_path, "bert"))
    assert encoder.encode_tokens([]).shape == (0, 32)
