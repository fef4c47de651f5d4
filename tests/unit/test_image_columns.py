"""Several poolings and layers of one image encoder: columns of their own from one forward pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model, ViTImageProcessorPil, ViTModel

from features.encoders import ImageEncoder
from features.errors import ConfigError, EncoderError, StoreMismatchError
from features.extract import Feeder
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import dump_config, load_config
from pipeline.run.extract import extract
from pipeline.stores.inspect import describe_store
from pipeline.tables import store_table
from tests import tiny

ALSO = """
[encoders.image.vit.also]
vit-mean = { pooling = "mean" }
vit-layer0 = { pooling = "cls", layer = 0 }
vit-before-norm = { pooling = "mean+max", layer = -2 }
"""
NAMES = ("vit", "vit-mean", "vit-layer0", "vit-before-norm")


def extracted(run_file: Path, *overrides: str) -> FeatureStore:
    stores = extract(load_config(str(run_file), overrides), StopRequest())
    return FeatureStore.open(stores[0])


def deeper(folder: Path, *, extra: str = ALSO) -> Path:
    """A run file whose image encoder has two layers, so that there is one between."""
    run_file = tiny.world(folder, extra=[extra])
    config = tiny.vit_config(num_hidden_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
    return run_file


def test_each_column_holds_its_layer_and_pooling_as_transformers_gives_them(tmp_path: Path) -> None:
    store = extracted(deeper(tmp_path))
    model = AutoModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "vit")
    images = [tiny.reopened(tiny.picture(seed)) for seed in (0, 33)]
    with torch.inference_mode():
        output = model(
            processor(images, return_tensors="pt")["pixel_values"], output_hidden_states=True
        )
    middle = output.hidden_states[-2][:, 1:]
    expected = {
        "vit": output.last_hidden_state[:, 0],
        "vit-mean": output.last_hidden_state[:, 1:].mean(1),
        "vit-layer0": output.hidden_states[0][:, 0],
        "vit-before-norm": torch.cat([middle.mean(1), middle.amax(1)], dim=1),
    }
    for name, features in expected.items():
        column = store.column(f"image/{name}")
        found = column.read(0, store.rows)[[0, 33]].astype(np.float32)
        np.testing.assert_allclose(found, features.numpy(), atol=2e-3)
        assert column.fingerprint["dim"] == features.shape[1]
    layers = [store.column(f"image/{name}").fingerprint["layer"] for name in NAMES]
    assert layers == [-1, -1, 0, -2]


def test_all_columns_are_filled_by_one_pass_over_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = count_forwards(monkeypatch)
    extracted(deeper(tmp_path))
    assert len(batches) == 40 / 4 + 16 / 4  # both splits, four images at a time
    assert set(batches) == {4}  # columns


def test_a_column_that_is_added_later_is_the_only_one_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = deeper(tmp_path, extra="")
    extracted(run_file)
    before = written(tmp_path, "vit")
    batches = count_forwards(monkeypatch)
    added = 'encoders.image.vit.also={ vit-mean = { pooling = "mean" } }'
    store = extracted(run_file, added)
    assert set(batches) == {1}
    assert store.column("image/vit-mean").pending() == []
    assert written(tmp_path, "vit") == before

    alone = FeatureStore.open(
        extract(load_config(str(run_file), [added, elsewhere(tmp_path)]), StopRequest())[0]
    )
    for name in ("vit", "vit-mean"):
        np.testing.assert_array_equal(
            store.column(f"image/{name}").read(0, 40), alone.column(f"image/{name}").read(0, 40)
        )


def elsewhere(folder: Path) -> str:
    return f"run.dir='{folder / 'elsewhere'}'"


def test_a_chunk_that_is_missing_in_one_column_is_written_in_that_alone(tmp_path: Path) -> None:
    run_file = deeper(tmp_path)
    store = extracted(run_file)
    mean = store.column("image/vit-mean")
    expected, before = mean.read(0, 40), written(tmp_path, "vit")
    for file in written(tmp_path, "vit-mean"):
        if file.parts[-2:] == ("c", "2") or file.parts[-3:] == ("c", "2", "0"):
            file.unlink()
    assert mean.pending() == [2]
    extracted(run_file)
    np.testing.assert_array_equal(mean.read(0, 40), expected)
    assert written(tmp_path, "vit") == before


def written(folder: Path, column: str) -> dict[Path, int]:
    """The files of a column, and when each was written."""
    path = folder / "run" / "features" / "train.zarr" / "image" / column
    return {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def test_features_that_come_back_late_land_in_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a batch is handed over before the one ahead of it is back."""
    run_file = deeper(tmp_path)
    expected = extracted(run_file)
    start = Feeder.__init__

    def several_ahead(self: Feeder, encoder: ImageEncoder) -> None:
        start(self, encoder)
        self.ahead = 3  # more than the two batches of a chunk

    monkeypatch.setattr(Feeder, "__init__", several_ahead)
    found = extracted(run_file, elsewhere(tmp_path))
    for name in NAMES:
        np.testing.assert_array_equal(
            found.column(f"image/{name}").read(0, 40), expected.column(f"image/{name}").read(0, 40)
        )


def test_inspection_tells_the_layer_and_the_mode_of_a_column(tmp_path: Path) -> None:
    store = extracted(deeper(tmp_path))
    description = describe_store(store.path)
    inner = description["columns"]["image/vit-before-norm"]["fingerprint"]
    assert (inner["pooling"], inner["layer"], inner["mode"]) == ("mean+max", -2, "exact")
    assert "mean+max, layer -2" in " ".join(store_table(description).split())


def test_another_layer_under_the_same_name_is_refused_by_name(tmp_path: Path) -> None:
    run_file = deeper(tmp_path)
    extracted(run_file)
    with pytest.raises(StoreMismatchError, match=r"image/vit-layer0 has layer = 0, .* expects 1"):
        extracted(run_file, "encoders.image.vit.also.vit-layer0.layer=1")


def test_a_layer_that_the_model_has_not_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"ViTModel has no layer 7\. -3 to 2 was expected"):
        extracted(deeper(tmp_path), "encoders.image.vit.layer=7")
    pixels = ["model='baseline:pixels'", "pooling='pooler'"]
    with pytest.raises(EncoderError, match=r"_Pixels has no layer 0\. -1 alone was expected"):
        extracted(tmp_path / "tiny.toml", *(f"encoders.image.vit.{each}" for each in pixels))


def test_the_hidden_states_of_dinov2_are_from_before_its_normalisation() -> None:
    """What the recipes' documentation says of `layer`."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
        output = model(torch.rand(1, 3, 28, 28), output_hidden_states=True)
    torch.testing.assert_close(
        model.layernorm(output.hidden_states[-1]), output.last_hidden_state, rtol=0, atol=0
    )
    assert not torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_names_of_columns_must_not_collide(tmp_path: Path) -> None:
    run_file = str(tiny.world(tmp_path, extra=[ALSO]))
    with pytest.raises(ConfigError, match=r"columns 'vit-mean' are named more than once"):
        load_config(run_file, ["encoders.image.vit-mean.model='x'"])
    with pytest.raises(ConfigError, match=r"columns 'vit' are named more than once"):
        load_config(run_file, ["encoders.image.vit.also.vit.pooling='mean'"])


def test_a_pooler_of_an_inner_layer_is_refused(tmp_path: Path) -> None:
    run_file = str(tiny.world(tmp_path, extra=[ALSO]))
    with pytest.raises(ConfigError, match="layer = 0 was given"):
        load_config(run_file, ["encoders.image.vit.also.vit-layer0.pooling='pooler'"])


def test_any_column_can_be_aligned_and_the_encoders_own_is_the_default(tmp_path: Path) -> None:
    run_file = str(tiny.world(tmp_path, extra=[ALSO]))
    assert load_config(run_file).aligned_encoder("image") == "vit"
    chosen = load_config(run_file, ["align.image='vit-layer0'"])
    assert chosen.aligned_encoder("image") == "vit-layer0"
    with pytest.raises(ConfigError, match=r"\[encoders.image\] has .*'vit-layer0'"):
        load_config(run_file, ["align.image='vit-layer1'"])
    copy = tmp_path / "copy.toml"
    copy.write_text(dump_config(chosen), encoding="utf-8")
    assert load_config(str(copy)) == chosen


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note, for each batch from now on, how many columns it is encoded for."""
    from features.encoders import image

    batches: list[int] = []
    encode = image.ImageEncoder.encode

    def counted(self, pixels, columns=None, **options):  # type: ignore[no-untyped-def]
        if columns is not None:  # all of them are asked for in a trial alone
            batches.append(len(columns))
        return encode(self, pixels, columns, **options)

    monkeypatch.setattr(image.ImageEncoder, "encode", counted)
    return batches
