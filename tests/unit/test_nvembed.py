"""Our own NV-Embed: what it loads, what it refuses, and what it says of its licence."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.encoders.nvembed import NVEmbed
from features.errors import EncoderError
from tests import text_models

CAPTIONS = ["a red circle", "two blue squares on a green star", "", "a</s> b"]


def loaded(folder: Path, **settings: Any) -> TextEncoder:
    config = TextEncoderConfig(model=str(folder), **settings)
    return load_text_encoder("tiny", config, torch.device("cpu"))


def test_weights_in_shards_give_the_same_as_in_one_file(tmp_path: Path) -> None:
    whole = loaded(text_models.nvembed(tmp_path / "whole")).encode(CAPTIONS)
    shards = loaded(text_models.nvembed(tmp_path / "shards", shards=3)).encode(CAPTIONS)
    np.testing.assert_array_equal(whole, shards)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def test_a_missing_shard_is_refused_with_the_names_of_its_weights(tmp_path: Path) -> None:
    folder = text_models.nvembed(tmp_path, shards=2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        EncoderError,
        match=r"17 are missing \(embedding_model\.embed_tokens\.weight, .* 0 are unexpected",
    ):
        loaded(folder)


def test_weights_of_another_model_are_refused_with_their_names(tmp_path: Path) -> None:
    folder = text_models.nvembed(tmp_path)
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "model-extra.safetensors")
    with pytest.raises(EncoderError, match=r"0 are missing .* 1 are unexpected \(lm_head\.weight"):
        loaded(folder)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    folder = text_models.nvembed(tmp_path)
    path = folder / "model-00001-of-00001.safetensors"
    weights = load_file(path)
    weights["latent_attention_model.latents"] = torch.zeros(7, 32)
    save_file(weights, path)
    with pytest.raises(EncoderError, match=r"latents of shape \(7, 32\).*\(6, 32\) was expected"):
        loaded(folder)


def test_a_config_without_the_latent_attention_is_refused(tmp_path: Path) -> None:
    folder = text_models.nvembed(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["latent_attention_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=r"does not describe an NV-Embed .*latent_attention_con"):
        loaded(folder)


def test_a_checkpoint_without_its_tokenizer_file_is_refused(tmp_path: Path) -> None:
    folder = text_models.nvembed(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"has no tokenizer\.json"):
        loaded(folder)


def test_another_pooling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"pooling = 'last', .* Set pooling = 'mean'"):
        loaded(text_models.nvembed(tmp_path), pooling="last")


def test_an_instruction_that_leaves_nothing_to_pool_is_refused(tmp_path: Path) -> None:
    encoder = loaded(text_models.nvembed(tmp_path), instruction="Query: ", max_length=8)
    with pytest.raises(EncoderError, match=r"has 8 tokens after cutting .* 8 of the instruction"):
        encoder.encode(["a red circle"])


def test_the_instruction_is_read_but_not_pooled(tmp_path: Path) -> None:
    folder = text_models.nvembed(tmp_path)
    plain, instructed = loaded(folder), loaded(folder, instruction="Query: ")
    assert isinstance(plain.model, NVEmbed)
    assert isinstance(instructed.model, NVEmbed)
    assert (plain.model.instruction_tokens, instructed.model.instruction_tokens) == (0, 8)
    ids = instructed.tokenise(["a cat"])
    with_it = instructed.encode_tokens(ids)
    plain.model.instruction_tokens = 8
    np.testing.assert_array_equal(plain.encode_tokens(ids), with_it)
    plain.model.instruction_tokens = 0
    assert np.abs(plain.encode_tokens(ids) - with_it).max() > 1e-3
    assert np.abs(plain.encode(["a cat"]) - with_it).max() > 1e-3


def test_left_padded_checkpoints_pool_the_instruction_too(tmp_path: Path) -> None:
    folder = text_models.nvembed(tmp_path, padding_side="left")
    encoder = loaded(folder, instruction="Query: ")
    assert isinstance(encoder.model, NVEmbed)
    assert encoder.model.instruction_tokens == 0


@pytest.mark.parametrize(("precision", "error"), [("float16", 1e-4), ("bfloat16", 1e-2)])
def test_half_weights_keep_exact_rotations_and_come_near_the_float32_result(
    tmp_path: Path, precision: str, error: float
) -> None:
    folder = text_models.nvembed(tmp_path)
    exact, half = loaded(folder), loaded(folder, precision=precision)
    assert isinstance(half.model, NVEmbed)
    assert {str(weight.dtype) for weight in half.model.parameters()} == {f"torch.{precision}"}
    assert half.model.trunk.rotary_emb.inv_freq.dtype == torch.float32
    cosines = (exact.encode(CAPTIONS) * half.encode(CAPTIONS)).sum(1)
    assert (1 - cosines).max() < error


def test_keys_and_values_of_the_latents_are_computed_once(tmp_path: Path) -> None:
    encoder = loaded(text_models.nvembed(tmp_path))
    assert isinstance(encoder.model, NVEmbed)
    encoder.model.latent.to_key_value = torch.nn.Linear(1, 1)  # a call would not fit
    assert np.isfinite(encoder.encode(CAPTIONS)).all()


def test_the_licence_is_in_the_fingerprint_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = text_models.nvembed(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert loaded(folder).fingerprint["licence"] == "cc-by-nc-4.0"
    assert "licence cc-by-nc-4.0: its features are for non-commercial use" in caplog.text
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert loaded(folder).fingerprint["licence"] == "mit"


def test_vectors_keep_their_length_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    latent = text_models.NVEMBED["latent_attention_config"] | {"output_normalize": False}
    folder = text_models.nvembed(tmp_path, latent_attention_config=latent)
    lengths = np.linalg.norm(loaded(folder).encode(CAPTIONS), axis=1)
    assert np.abs(lengths - 1).min() > 0.1
