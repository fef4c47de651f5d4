"""Folders of sentence-transformers, written by that library: tiny, of random weights."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from tests import text_models, tiny

TEXTS = [
    *("a red circle", "The Green star, left of a BLUE square.", "a", "small small small"),
    *(tiny.caption(seed) for seed in range(10)),
    *("the large star above the small circle " * 2, "Unknown words; punctuation!", "a  b"),
    *("circle\nsquare", " star", "below " * 40),
]
TOLERANCE = 2e-6  # of a value, after scaling to length 1, in float32


def loaded(folder: Path, **settings: Any) -> TextEncoder:
    """Load an encoder by its name alone, but for some settings."""
    config = TextEncoderConfig(model=str(folder), precision="float32", **settings)
    return load_text_encoder("tiny", config, torch.device("cpu"))


def unit(vectors: Any) -> np.ndarray:
    """Scale vectors to length 1."""
    array = np.asarray(vectors, dtype=np.float64)
    scaled: np.ndarray = array / np.linalg.norm(array, axis=1, keepdims=True)
    return scaled


def reference(folder: Path, texts: Sequence[str] = TEXTS) -> np.ndarray:
    """What sentence-transformers makes of texts."""
    library = pytest.importorskip("sentence_transformers", reason="the reference is not installed")
    model = library.SentenceTransformer(str(folder), device="cpu")
    return unit(model.encode(list(texts), batch_size=4, convert_to_numpy=True))


def check_equal(folder: Path, **settings: Any) -> TextEncoder:
    """Compare an encoder by its name alone with sentence-transformers."""
    expected = reference(folder)
    encoder = loaded(folder, **settings)
    np.testing.assert_allclose(unit(encoder.encode(TEXTS)), expected, atol=TOLERANCE, rtol=0)
    return encoder


def trunk(folder: Path, model_type: str = "bert", **settings: Any) -> Path:
    """Write a model with a tokenizer of words (BERT) or letters."""
    if model_type == "bert" and not settings:
        return tiny.text_encoder(folder)
    text_models.transformers_model(folder, model_type, **{"pad_token_id": 0, **settings})
    change(folder / "tokenizer_config.json", pad_token="<unk>")
    return folder


def sentence_folder(
    folder: Path,
    pooling: str | tuple[str, ...] = "mean",
    behind: Callable[[int], list[Any]] = lambda _: [],
    *,
    model_type: str = "bert",
    include_prompt: bool = True,
    **library: Any,
) -> Path:
    """Write a folder of sentence-transformers.

    Args:
        folder: Where; the trunk lies there before.
        pooling: Its mode in that library.
        behind: Makes the modules behind the pooling from its dimension.
        model_type: Of the trunk.
        include_prompt: Whether the prompt is pooled too.
        **library: Prompts and the like, for `SentenceTransformer`.
    """
    models = pytest.importorskip(
        "sentence_transformers.sentence_transformer.modules", reason="it is not installed"
    )
    from sentence_transformers import SentenceTransformer

    source = trunk(folder.parent / f"{folder.name}-trunk", model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer = models.Transformer(str(source))
        pooled = models.Pooling(
            transformer.get_embedding_dimension(), pooling, include_prompt=include_prompt
        )
        modules = [transformer, pooled, *behind(pooled.pooling_output_dimension)]
        SentenceTransformer(modules=modules, device="cpu", **library).save_pretrained(str(folder))
    return folder


def dense(inputs: int, outputs: int, activation: nn.Module | None = None, **others: Any) -> Any:
    """Return a Dense of that library with weights that matter."""
    from sentence_transformers.sentence_transformer.modules import Dense

    made = Dense(inputs, outputs, activation_function=activation or nn.Identity(), **others)
    nn.init.normal_(made.linear.weight, std=0.3)
    return made


def change(path: Path, **settings: Any) -> None:
    """Change some settings of a JSON file."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | settings))
