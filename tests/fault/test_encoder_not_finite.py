"""An encoder that gives NaN or infinity: its rows are quarantined with a status of their own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from features.encoders import TextEncoder
from features.errors import EncoderError
from features.status import Status
from features.storage.column import Column
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny


def extracted(run_file: Path) -> FeatureStore:
    """Run stage one and open the training store, which must be whole."""
    store = FeatureStore.open(extract(load_config(str(run_file)), StopRequest())[0])
    assert verify_store(store.path) == []
    return store


def change_weights(encoder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    weights = load_file(encoder / "model.safetensors")
    change(weights[name])
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})


def ok_rows(column: Column) -> list[bool]:
    """Return which rows are ok; the others must be zero and say that they are not finite."""
    status = column.status()
    assert set(status.tolist()) <= {Status.OK, Status.NOT_FINITE}
    assert not column.read(0, column.rows)[status == Status.NOT_FINITE].any()
    return [code == Status.OK for code in status.tolist()]


def test_weights_with_nan_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    change_weights(
        tmp_path / "bert", "encoder.layer.0.output.dense.bias", lambda bias: bias.fill_(torch.nan)
    )
    with pytest.raises(
        EncoderError, match=r"'encoder\.layer\.0\.output\.dense\.bias' .* not finite"
    ):
        extracted(run_file)
    assert not (tmp_path / "run").exists()


def test_a_word_whose_vector_overflows_quarantines_the_captions_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    star, forward = 4 + tiny.WORDS.index("star"), TextEncoder._forward

    def overflow(self: TextEncoder, sequences: Sequence[list[int]]) -> torch.Tensor:
        vectors = forward(self, sequences)
        vectors[[star in tokens for tokens in sequences]] = torch.inf
        return vectors

    monkeypatch.setattr(TextEncoder, "_forward", overflow)
    store = extracted(run_file)
    captions = store.captions("long").tolist()
    without_star = ["star" not in caption.split() for caption in captions]
    assert ok_rows(store.column("text/bert/long")) == without_star
    assert any(without_star)
    assert not all(without_star)


def test_features_beyond_float16_are_refused_with_their_size(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    most = float(np.finfo(np.float16).max)
    change_weights(tmp_path / "vit", "layernorm.bias", lambda bias: bias.fill_(2 * most))
    with pytest.raises(EncoderError, match=r"'vit' reach 13\d,\d{3} .* float16, up to 65504"):
        extracted(run_file)
