"""Static embeddings by their name alone, as model2vec itself encodes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder, resolve
from features.errors import EncoderError
from tests import tiny
from tests.commands import sail, the_error_of
from tests.conformance.sentences import TEXTS, TOLERANCE, unit

model2vec: Any = pytest.importorskip("model2vec", reason="model2vec is not installed")


def write(folder: Path, **settings: Any) -> Path:
    from tokenizers import Tokenizer

    tiny.text_encoder(folder / "words")
    tokenizer = Tokenizer.from_file(str(folder / "words" / "tokenizer.json"))
    random = np.random.default_rng(0)
    count = tokenizer.get_vocab_size()
    embeddings = random.standard_normal((count, 12)).astype(np.float32)
    weights = random.random(count) + 0.5 if settings.pop("weights", False) else None
    config = {"model_type": "model2vec"}  # as distilled models say
    model = model2vec.StaticModel(embeddings, tokenizer, config, weights=weights, **settings)
    model.save_pretrained(folder / "static")
    return folder / "static"


def loaded(model: str, **settings: Any) -> TextEncoder:
    config = TextEncoderConfig(model=model, **settings)
    return load_text_encoder("x", config, torch.device("cpu"))


@pytest.mark.parametrize(
    "settings", [{"normalize": True}, {"weights": True}, {"normalize": True, "max_length": 5}]
)
def test_static_embeddings_by_their_name_are_what_model2vec_gives(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = write(tmp_path, **settings)
    encoder = loaded(f"model2vec:{folder}")
    reference = model2vec.StaticModel.from_pretrained(folder).encode(TEXTS)
    found = encoder.encode([*TEXTS, "\u732b"])
    known = np.asarray(reference).any(axis=1)
    assert known.sum() > 10
    np.testing.assert_allclose(
        unit(found[:-1][known]), unit(reference[known]), atol=TOLERANCE, rtol=0
    )
    assert np.isnan(found[-1]).all()  # of unknown words alone: quarantined
    assert encoder.fingerprint["max_length"] == settings.get("max_length", 512)
    assert encoder.fingerprint["versions"]["model2vec"] == model2vec.__version__
    assert loaded(f"model2vec:{folder}", dim=5).encode(["a"]).shape == (1, 5)


def test_a_folder_of_model2vec_needs_no_prefix(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert resolve(TextEncoderConfig(model=str(folder)))["trunk"] == "static embeddings"
    (plan,) = json.loads(sail("encoders", folder, "--check", "--json").stdout)
    assert plan["check"]["equal"] is True


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    message = the_error_of(sail("encoders", folder, "--set", "layer=1", expect=1))
    assert "has layer = 1" in message
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(EncoderError, match="has no header of safetensors"):
        loaded(f"model2vec:{folder}")
