"""An encoder that gives NaN or infinity: its rows are quarantined with a status of their own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from features.errors import SourceError
from features.status import Status
from features.storage.column import Column
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.inspect import describe_store
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


def test_weights_with_nan_quarantine_every_row(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    change_weights(tmp_path / "vit", "layernorm.weight", lambda weight: weight.fill_(torch.nan))
    with pytest.raises(SourceError, match=r"Not one row can be used of .*: not finite 12"):
        extracted(run_file)
    store = FeatureStore.open(tmp_path / "run" / "features" / "train.zarr")
    assert not any(ok_rows(store.column("image/vit")))
    assert describe_store(store.path)["columns"]["image/vit"]["status"] == {"not finite": 12}


def test_a_word_of_infinite_weight_quarantines_the_captions_that_have_it(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    star = 4 + tiny.WORDS.index("star")

    def make_infinite(weight: torch.Tensor) -> None:
        weight[star] = torch.inf

    change_weights(tmp_path / "bert", "embeddings.word_embeddings.weight", make_infinite)
    store = extracted(run_file)
    captions = store.captions("long").tolist()
    without_star = ["star" not in caption.split() for caption in captions]
    assert ok_rows(store.column("text/bert/long")) == without_star
    assert any(without_star)
    assert not all(without_star)


def test_features_beyond_float16_are_quarantined_and_not_stored_as_infinity(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    most = float(np.finfo(np.float16).max)
    change_weights(tmp_path / "vit", "layernorm.bias", lambda bias: bias.fill_(2 * most))
    with pytest.raises(SourceError, match=r"Not one row can be used of .*: not finite 12"):
        extracted(run_file)
    store = FeatureStore.open(tmp_path / "run" / "features" / "train.zarr")
    assert not any(ok_rows(store.column("image/vit")))
