"""Features that another program wrote are trained on as those that `sail extract` wrote."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.config import TextEncoderConfig
from features.encoders.vectors import load_text
from features.errors import EncoderError
from tests.commands import sail, the_error_of
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


CLASSES = ("cat", "dog", "car", "tree")
IMPORTED = """
[run]
device = "cpu"
[data.train]
kind = "imported"
[data.test]
kind = "imported"
[encoders.text.reader]
model = "vectors:vectors.parquet"
[align]
batch_size = 64
steps = 20
head = {{ kind = "linear", dim = 8 }}
[eval]
zero_shot = ["test"]
templates = ["{{}}"]
knn = ["test"]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file without a source or a model, and arrays of features beside it."""
    folder = tmp_path_factory.mktemp("imported")
    random = np.random.default_rng(0)
    image, text = random.standard_normal((4, 16)), random.standard_normal((4, 12))
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    vectors = {"text": list(CLASSES), "vector": text.astype(np.float32).tolist()}
    pq.write_table(pa.table(vectors), folder / "vectors.parquet")
    (folder / "run.toml").write_text(IMPORTED.format())
    for split, rows in (("train", 200), ("test", 80)):
        arrays = folder / split
        arrays.mkdir()
        labels = random.integers(0, 4, rows)
        noise = 0.2 * random.standard_normal((rows, 16))
        np.save(arrays / "image.npy", (image[labels] + noise).astype(np.float16))
        np.save(arrays / "text.npy", (text[labels] + noise[:, :12]).astype(np.float16))
        words = [f"{CLASSES[label]} {row}" for row, label in enumerate(labels)]
        np.save(arrays / "words.npy", np.array(words))
        np.save(arrays / "label.npy", labels.astype(np.int32))
        np.save(arrays / "key.npy", np.array([f"{split}{row}" for row in range(rows)]))
    return folder


def import_splits(world: Path, run: Path) -> None:
    taken = {"image/eye": "image", "text/reader/long": "text", "caption/long": "words"}
    taken |= {"label": "label", "key": "key"}
    options = [word for name, array in taken.items() for word in ("--take", f"{name}={array}.npy")]
    for split in ("train", "test"):
        out = run / "features" / f"{split}.zarr"
        names = ("--class-names", world / "classes.txt")
        sail("import-store", world / split, "--from", "npy", "--out", out, *options, *names)


def test_a_run_needs_no_encoder_where_features_and_vectors_are_imported(
    world: Path, tmp_path: Path
) -> None:
    here = ("--set", f"run.dir='{tmp_path / 'run'}'")
    refused = the_error_of(sail("extract", world / "run.toml", *here, expect=1))
    assert "no store is there" in refused
    import_splits(world, tmp_path / "run")
    stores = sail("extract", world / "run.toml", *here).stdout.split()
    assert stores == [
        str(tmp_path / "run/features" / f"{split}.zarr") for split in ("train", "test")
    ]
    sail("align", world / "run.toml", *here)
    sail("eval", world / "run.toml", *here)
    results = json.loads((tmp_path / "run/eval/results.json").read_text())["results"]
    (top1,) = [row for row in results if row["task"] == "zero_shot" and row["metric"] == "top1"]
    assert top1["value"] > 0.95
    found = json.loads(sail("search", tmp_path / "run", "cat", "--split", "test", "--json").stdout)
    assert all("cat" in hit["captions"]["long"] for hit in found[:5])
    unknown = the_error_of(sail("search", tmp_path / "run", "a cow", "--split", "test", expect=1))
    assert "has no vector for the text 'a cow'" in unknown


def test_other_vectors_are_measured_again_and_those_of_another_length_are_refused(
    world: Path, tmp_path: Path
) -> None:
    import_splits(world, tmp_path / "run")
    for name in ("run.toml", "vectors.parquet"):
        (tmp_path / name).write_bytes((world / name).read_bytes())
    run_file = tmp_path / "run.toml"
    here = ("--set", f"run.dir='{tmp_path / 'run'}'")
    sail("align", run_file, *here)
    sail("eval", run_file, *here)
    before = (tmp_path / "run/eval/results.json").read_text()
    vectors = pq.read_table(tmp_path / "vectors.parquet")
    turned = pa.table({"text": list(CLASSES[1:] + CLASSES[:1]), "vector": vectors["vector"]})
    pq.write_table(turned, tmp_path / "vectors.parquet")
    sail("eval", run_file, *here)
    assert (tmp_path / "run/eval/results.json").read_text() != before
    short = pa.table({"text": list(CLASSES), "vector": [[1.0, 2.0]] * 4})
    pq.write_table(short, tmp_path / "vectors.parquet")
    error = the_error_of(sail("eval", run_file, *here, expect=1))
    assert "dim = 2, but the head was trained with 12" in error


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a"], "vectors": [[1.0]]}, "is no table of vectors"),
        ({"text": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, r"have the lengths \[1, 2\]"),
        ({"text": ["a"], "vector": [[float("nan")]]}, "a vector is not finite"),
        ({"text": ["a", "a"], "vector": [[1.0], [2.0]]}, "the text 'a' comes twice"),
        (None, "is not there. A parquet file"),
    ],
)
def test_what_is_no_table_of_vectors_is_refused(
    table: dict[str, list[object]] | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "vectors.parquet"
    if table is not None:
        pq.write_table(pa.table(table), file)
    with pytest.raises(EncoderError, match=message):
        load_text("reader", TextEncoderConfig(model=f"vectors:{file}"), torch.device("cpu"))
