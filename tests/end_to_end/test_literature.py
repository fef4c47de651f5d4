"""Ways of the literature, each a run file of ten lines, against transformers alone.

That of CLIP is in tests/conformance/test_open_clip.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from features.config import TextEncoderConfig
from features.encoders import load_text_encoder
from features.errors import EncoderError
from features.store import FeatureStore
from pipeline.python import load_aligned
from tests import text_models, tiny
from tests.commands import sail, the_error_of
from tests.conformance.sentences import change

# Last token of a plain language model, no end token.
SHARELOCK = """\
run = { dir = "run", threads = 1 }
data.train = { kind = "webdataset", path = "shards/train-*.tar" }
encoders.image.vit = { model = "vit", pooling = "cls" }
encoders.text.llama = { model = "llama", pooling = "last", end_token = false }
align = { batch_size = 8, steps = 2 }
"""
# Every layer, the mean of its tokens; of images the class token of every layer.
PLATONIC = """\
run = { dir = "run", threads = 1 }
data.train = { kind = "webdataset", path = "shards/train-*.tar" }
extract.rows_per_chunk = 8
[encoders.image]
vit = { model = "vit", pooling = "cls", layer = 0, also.v1 = { pooling = "cls", layer = 1 } }
[encoders.text]
llama = { model = "llama", pooling = "mean", layer = 0, also = { l1.layer = 1, l2.layer = 2 } }
[align]
text = "l1"
batch_size = 8
steps = 2
"""


def written(folder: Path, run_file: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    tiny.world(folder, rows=24)
    text_models.transformers_model(folder / "llama", "llama", pad_token_id=0)
    change(folder / "llama" / "tokenizer_config.json", pad_token="<unk>")
    (folder / "run.toml").write_text(run_file)
    return folder / "run.toml"


def states(folder: Path, text: str) -> tuple[torch.Tensor, ...]:
    """Every layer of one text, without a token behind it, and the last one normalised."""
    model = AutoModel.from_pretrained(folder).eval()
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    return (*output.hidden_states, output.last_hidden_state)


def captions(field: str) -> list[str]:
    return [json.loads(d)[field] for name, d in tiny.samples(24) if name.endswith("json")]


@pytest.mark.slow
def test_sharelock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = written(tmp_path, SHARELOCK, monkeypatch)
    sail("extract", run_file)
    store = FeatureStore.open(tmp_path / "run" / "features" / "train.zarr")
    found = store.column("text/llama/long").read(0, 24).astype(np.float32)
    texts = captions("long")
    expected = torch.cat([states(tmp_path / "llama", text)[-1][:, -1] for text in texts])
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-3)  # a store holds float16


@pytest.mark.slow
def test_platonic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = written(tmp_path, PLATONIC, monkeypatch)
    sail("extract", run_file)
    store = FeatureStore.open(tmp_path / "run" / "features" / "train.zarr")
    for field in ("short", "long"):
        texts = captions(field)
        for layer, name in enumerate(["llama", "l1", "l2"]):
            found = store.column(f"text/{name}/{field}").read(0, 24).astype(np.float32)
            rows = [states(tmp_path / "llama", text)[layer].mean(1) for text in texts]
            np.testing.assert_allclose(found, torch.cat(rows), atol=2e-3, rtol=1e-3)
    assert store.column("text/l1/long").fingerprint["layer"] == 1
    # A column of `also` is one of its own to everything that reads it.
    sail("align", run_file)
    aligned = load_aligned(tmp_path / "run", device="cpu")
    assert aligned.text_encoder.fingerprint["layer"] == 1
    assert aligned.encode_text(["a red circle"]).shape == (1, 16)  # the shorter feature
    message = the_error_of(
        sail("extract", run_file, "--set", "encoders.text.llama.also.l2.layer=1", expect=1)
    )
    assert "text/l2" in message
    assert "layer" in message


def test_columns_of_one_pass_are_those_of_an_encoder_each(tmp_path: Path) -> None:
    text_models.transformers_model(tmp_path, "llama", pad_token_id=0)
    own: dict[str, Any] = {"model": str(tmp_path), "precision": "float32", "dim": 5}

    def load(**settings: Any) -> Any:
        config = TextEncoderConfig.model_validate(own | settings)
        return load_text_encoder("x", config, torch.device("cpu"))

    also = {"a": {"layer": 1}, "b": {"pooling": "last", "layer": -2}, "c": {"pooling": "max+mean"}}
    several = load(pooling="mean", also=also)
    texts = [*map(tiny.caption, range(5)), "a", "the red " * 9]
    found = np.split(several.encode(texts), np.cumsum([each.dim for each in several.columns]), 1)
    assert list(several.fingerprints) == ["text/x", "text/a", "text/b", "text/c"]
    alone: list[dict[str, Any]] = [
        {},
        {"layer": 1},
        {"pooling": "last", "layer": -2},
        {"pooling": "max+mean"},
    ]
    for vectors, column, settings in zip(found[:-1], several.columns, alone, strict=True):
        single = load(**{"pooling": "mean", **settings})
        np.testing.assert_array_equal(vectors, single.encode(texts))
        assert column.fingerprint == single.fingerprint
    with pytest.raises(EncoderError, match="has no layer 9"):
        load(pooling="mean", also={"a": {"layer": 9}})
    with pytest.raises(EncoderError, match="Set `pooling` of the text encoder"):
        load(also={"a": {"pooling": "last"}}, pooling="auto")
