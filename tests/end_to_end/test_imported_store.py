"""Features that another program wrote are trained on as those that `sail extract` wrote."""

import json
from pathlib import Path

import numpy as np

from tests.commands import sail
from tests.feature_stores import IMAGE, TEXT, make_store

RECIPE = """
[run]
dir = "{folder}/run"
device = "cpu"
[data.train]
kind = "folder"
path = "train.jsonl"
[encoders.image.eye]
model = "none"
[encoders.text.reader]
model = "none"
[align]
batch_size = 32
steps = 12
memory_mb = 1
head = {{ kind = "linear", dim = 8 }}
store = "{folder}/imported.zarr"
"""


def test_a_head_is_trained_on_imported_features_as_on_our_own(tmp_path: Path) -> None:
    store = make_store(tmp_path / "own.zarr")
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "image.npy", store.column(f"image/{IMAGE}").read(0, store.rows))
    np.save(arrays / "text.npy", store.column(f"text/{TEXT}/long").read(0, store.rows))
    np.save(arrays / "words.npy", np.array(store.captions("long").tolist()))
    sail(
        *("import-store", arrays, "--out", tmp_path / "imported.zarr"),
        *("--take", f"image/{IMAGE}=image.npy", "--take", f"text/{TEXT}/long=text.npy"),
        *("--take", "caption/long=words.npy"),
    )
    (tmp_path / "run.toml").write_text(RECIPE.format(folder=tmp_path))
    sail("align", tmp_path / "run.toml")
    lines = (tmp_path / "run" / "align" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses[-1] < losses[0]
