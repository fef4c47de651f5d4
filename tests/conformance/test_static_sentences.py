"""Tables of vectors in folders of sentence-transformers, as that library encodes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import load_text_encoder, resolve
from features.errors import EncoderError
from tests import tiny
from tests.commands import sail
from tests.conformance.sentences import TEXTS, TOLERANCE, dense, unit

PLACE = "0_StaticEmbedding"


def write(folder: Path, *behind: Any, **library: Any) -> Path:
    from tokenizers import Tokenizer

    modules = pytest.importorskip(
        "sentence_transformers.sentence_transformer.modules", reason="it is not installed"
    )
    from sentence_transformers import SentenceTransformer

    tiny.text_encoder(folder / "words")
    tokenizer = Tokenizer.from_file(str(folder / "words" / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        table = modules.StaticEmbedding(tokenizer, embedding_dim=12)
        every = [table, *(make() for make in behind)]
        SentenceTransformer(modules=every, device="cpu", **library).save_pretrained(
            str(folder / "static")
        )
    return folder / "static"


def inside(folder: Path) -> Path:
    (path,) = folder.rglob("tokenizer.json")
    return path.parent


def encode(folder: Path, texts: list[str], **settings: Any) -> Any:
    config = TextEncoderConfig(model=str(folder), **settings)
    return load_text_encoder("x", config, torch.device("cpu")).encode(texts)


def reference(folder: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options).encode(list(TEXTS))


@pytest.mark.parametrize("kind", ["alone", "unit", "dense", "prompt", "model2vec"])
def test_a_table_by_its_name_is_what_sentence_transformers_gives(tmp_path: Path, kind: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    behind: dict[str, list[Any]] = {"unit": [Normalize], "dense": [lambda: dense(12, 7, nn.Tanh())]}
    prompts = {"prompts": {"query": "a photo of "}, "default_prompt_name": "query"}
    library = prompts if kind == "prompt" else {}
    folder = write(tmp_path, *behind.get(kind, []), **library)
    if kind == "model2vec":
        path = inside(folder) / "model.safetensors"
        table = load_file(path)["embedding.weight"]
        mapping = torch.arange(len(table)) // 2
        weights = torch.linspace(0.5, 1.5, len(table))
        save_file({"embeddings": table, "mapping": mapping, "weights": weights}, path)
    found, expected = encode(folder, list(TEXTS)), reference(folder)
    known = np.isfinite(found).all(axis=1)
    assert known.sum() > 10
    np.testing.assert_allclose(unit(found[known]), unit(expected[known]), atol=TOLERANCE, rtol=0)
    if kind == "alone":
        assert np.isnan(encode(folder, [""])).all()  # without a token: quarantined
        short = encode(folder, list(TEXTS), dim=5, normalise=True)[known]
        cut = reference(folder, truncate_dim=5)[known]
        np.testing.assert_allclose(short, unit(cut), atol=TOLERANCE, rtol=0)
        (plan,) = json.loads(sail("encoders", folder, "--check", "--json").stdout)
        assert plan["check"]["equal"] is True


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(EncoderError, match="has layer = 1"):
        resolve(TextEncoderConfig(model=str(folder), layer=1))
    with pytest.raises(EncoderError, match="dim = 13, but"):
        encode(folder, ["a"], dim=13)
    with pytest.raises(EncoderError):
        resolve(ImageEncoderConfig(model=str(folder)))
    path = inside(folder) / "model.safetensors"
    table = load_file(path)["embedding.weight"]
    save_file({"embedding.weight": table[:-3].clone()}, path)
    with pytest.raises(EncoderError, match="has the token"):
        encode(folder, ["a"])
    table = torch.full((500, 12), torch.nan)
    save_file({"embedding.weight": table}, path)
    with pytest.raises(EncoderError, match="not finite"):
        encode(folder, ["a"])
    save_file({"embedding.weight": torch.zeros(500)}, path)
    with pytest.raises(EncoderError, match="no table"):
        encode(folder, ["a"])
    save_file({"other": table}, path)
    with pytest.raises(EncoderError, match="cannot be read"):
        encode(folder, ["a"])
