"""Several columns of a store that are read side by side as one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.heads import build_model
from align.loader import MIB, Loader, LoaderOptions, Source
from evaluate.embedder import Embedder, prompt_features
from features.errors import CheckpointError, ConfigError, EvaluationError
from features.status import Status
from features.store import FeatureStore
from pipeline.export.exports import export_run
from pipeline.interrupt import StopRequest
from pipeline.python import load_aligned
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from tests.feature_stores import IMAGE, TEXT, make_store
from tests.tiny import encoded, picture
from tests.trained import trained

BOTH = (
    "encoders.image.vit.also={flat = {pooling = 'mean'}}",
    "encoders.text.bert.also={first = {pooling = 'cls'}}",
    "align.image=['flat', 'vit']",
    "align.text=['bert', 'first']",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("several"), *BOTH)


def with_second_columns(path: Path) -> FeatureStore:
    """A store with a second image column in 8 bits, one row of it not ok, and a second of texts."""
    store = make_store(path, bad_images=(3,))
    random = np.random.default_rng(7)
    store.add_encoder("image/low", {"model": "low"}, dim=6, dtype="int8")
    store.add_encoder("text/other", {"model": "other"}, dim=4)
    for name in ["image/low", *(f"text/other/{field}" for field in store.fields)]:
        column = store.column(name)
        for chunk in range(column.num_chunks):
            rows = column.chunk_rows(chunk)
            status = np.full(rows, Status.OK, dtype=np.uint8)
            if name == "image/low" and chunk == 0:
                status[5] = Status.NOT_AN_IMAGE
            values = random.standard_normal((rows, column.dim)).astype(np.float16)
            column.write(chunk, values, status)
    return store


@pytest.mark.parametrize("memory", [15_000, 10 * MIB])
def test_batches_have_the_features_of_all_columns_side_by_side(tmp_path: Path, memory: int) -> None:
    store = with_second_columns(tmp_path / "a.zarr")
    columns = Columns.open(store, AlignConfig(), f"low+{IMAGE}", f"{TEXT}+other")
    selection = select_rows(columns, holdout=0.0, holdout_rows=1)
    assert np.flatnonzero(~selection.train).tolist() == [3, 5]  # not ok in one column or the other
    image = np.hstack([store.column(f"image/{name}").read(0, 200) for name in ("low", IMAGE)])
    texts = [
        np.hstack([store.column(f"text/{name}/{field}").read(0, 200) for name in (TEXT, "other")])
        for field in store.fields
    ]
    options = LoaderOptions(batch_size=24, memory_bytes=memory)
    loader = Loader([Source(columns, selection.train, selection.text_ok)], options)
    assert loader.tier == ("streaming" if memory < MIB else "device")
    assert loader.nbytes <= memory
    for batch in loader.batches(0, 20):
        np.testing.assert_array_equal(batch.image.numpy(), image[batch.rows])
        np.testing.assert_array_equal(batch.text.numpy(), np.stack(texts, axis=1)[batch.rows])


def test_no_column_outweighs_another_by_its_scale() -> None:
    model = build_model({"kind": "linear", "dim": 3}, image_dim=[4, 6], text_dim=5)
    features = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    scaled = features * torch.tensor([1000.0] * 4 + [1.0] * 6)
    torch.testing.assert_close(
        model.embed_image(scaled), model.embed_image(features), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_what_reads_several_columns_embeds_what_is_new_as_it_embeds_the_store(
    run: Path, tmp_path: Path
) -> None:
    aligned = load_aligned(run, device="cpu")
    store = FeatureStore.open(run / "features" / "train.zarr")
    embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
    captions = [str(each) for each in store.captions("long")]
    stored = embedder.captions(store, "long").vectors.numpy()
    np.testing.assert_allclose(aligned.encode_text(captions), stored, atol=2e-3)
    prompts = prompt_features(aligned.encoders.text_columns, embedder, captions, tmp_path)
    features = embedder.text_column(store, "long").read(0, store.rows)
    np.testing.assert_allclose(prompts, features, atol=2e-3)
    images = aligned.encode_image([encoded(picture(seed)) for seed in range(store.rows)])
    np.testing.assert_allclose(images, embedder.images(store).vectors.numpy(), atol=2e-3)


@pytest.mark.slow
def test_what_cannot_read_several_columns_refuses_them(run: Path, tmp_path: Path) -> None:
    for form in ("hf", "onnx", "open_clip"):
        with pytest.raises(EvaluationError, match=r"several image columns side by side, flat\+vit"):
            export_run(run, form, tmp_path / "out")
    config = load_config(str(run), ["align.image=['vit', 'flat']"])
    with pytest.raises(CheckpointError, match=r"image\.name = 'flat\+vit'"):
        align_run(config, StopRequest())
    with pytest.raises(ConfigError, match="names 'none'"):
        load_config(str(run), ["align.image=['vit', 'none']"])
    described = run / "align" / "best" / "config.json"
    document = json.loads(described.read_text())
    document["run"]["image"]["dims"]["vit"] += 1
    del document["sha256"]
    described.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="are not those of its dims"):
        load_aligned(run, device="cpu")
