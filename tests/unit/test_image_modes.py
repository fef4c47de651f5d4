"""The settings `mode` and `compile` of an image encoder, through stage one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.errors import EncoderError, StoreMismatchError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny
from tests.feature_stores import as_version_1
from tests.photographs import as_jpeg, sideways, synthetic

ROOT = Path(__file__).resolve().parents[2]
FAST = "encoders.image.vit.mode='fast'"
NOT_FAST = r"image/vit has mode = 'exact', .* expects 'fast'"
NOT_EXACT = r"image/vit has mode = 'fast', .* expects 'exact'"


def extracted(run_file: Path, *overrides: str) -> FeatureStore:
    stores = extract(load_config(str(run_file), overrides), StopRequest())
    return FeatureStore.open(stores[0])


def test_both_modes_quarantine_the_same_rows_for_the_same_reasons(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    jpeg = as_jpeg(synthetic(0, 90, 60))
    grey, cmyk = (as_jpeg(synthetic(1, 90, 60).convert(mode)) for mode in ("L", "CMYK"))
    wrong = bytearray(jpeg)
    wrong[len(jpeg) // 2 : len(jpeg) // 2 + 8] = bytes(8)
    images = {
        "good": jpeg,
        "grey": grey,
        "cmyk": cmyk,
        "png": tiny.encoded(synthetic(2, 90, 60), "PNG"),
        "cut": jpeg[: len(jpeg) // 2],
        "unended": jpeg[:-2],
        "cut-cmyk": cmyk[: len(cmyk) // 2],
        "cut-png": tiny.encoded(synthetic(2, 90, 60), "PNG")[:500],
        "wrong": bytes(wrong),
        "begun": jpeg[:20],
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"no picture",
        "bomb": as_jpeg(synthetic(3, 400, 300)),
        "thin": as_jpeg(synthetic(4, 1, 300)),
    }
    record = json.dumps({"short": "a", "long": "b"}).encode()
    members = [
        member
        for name, data in images.items()
        for member in [(f"{name}.jpg", data), (f"{name}.json", record)]
    ]
    tiny.write_tar(tmp_path / "shards" / "train-1.tar", members)
    limit = "extract.max_pixels=100000"
    exact = extracted(run_file, limit)
    fast = extracted(run_file, limit, FAST, f"run.dir='{tmp_path / 'fast'}'")
    columns = [store.column("image/vit") for store in (exact, fast)]
    status = [
        dict(zip(exact.keys().tolist(), column.status().tolist(), strict=True))
        for column in columns
    ]
    assert status[0] == status[1]
    reasons = {name: status[0][f"train-1/{name}"] for name in images}
    assert {reasons[name] for name in ("good", "grey", "cmyk", "png")} == {1}
    assert set(reasons.values()) == {1, 2, 3, 4, 6}  # every reason that an image can have
    features = [column.read(0, exact.rows).astype(np.float32) for column in columns]
    np.testing.assert_allclose(features[0], features[1], atol=0.05)  # a grey level or two


def test_a_store_of_the_other_mode_is_refused_by_name(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    store = extracted(run_file)
    assert store.column("image/vit").fingerprint["mode"] == "exact"
    with pytest.raises(StoreMismatchError, match=NOT_FAST):
        extracted(run_file, FAST)
    shutil.rmtree(tmp_path / "run")
    extracted(run_file, FAST)
    with pytest.raises(StoreMismatchError, match=NOT_EXACT):
        extracted(run_file)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_an_encoder_that_turns_pictures_upright_sees_a_sideways_one_as_it_was(
    mode: str, tmp_path: Path
) -> None:
    run_file = tiny.world(tmp_path)
    picture = synthetic(0, 40, 20)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    members = [("0.png", sideways(picture, 1, "PNG")), ("1.png", sideways(turned, 6, "PNG"))]
    words = [(f"{number}.txt", b"a red circle") for number in range(2)]
    tiny.write_tar(tmp_path / "shards" / "train-0.tar", sorted(members + words))
    settings = [f"encoders.image.vit.mode={mode}", "data.train.path='shards/train-0.tar'"]
    store = extracted(run_file, *settings, "encoders.image.vit.upright=true")
    upright, sideways_one = store.column("image/vit").read(0, 2)
    np.testing.assert_array_equal(upright, sideways_one)
    with pytest.raises(StoreMismatchError, match=r"upright = True, .* expects False"):
        extracted(run_file, *settings)
    store = extracted(run_file, *settings, f"run.dir='{tmp_path / 'other'}'")
    upright, sideways_one = store.column("image/vit").read(0, 2)
    assert np.abs(upright - sideways_one).max() > 0.01


def test_a_store_from_before_modes_and_layers_counts_as_exact_and_last(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    extracted(run_file)
    about = tmp_path / "run" / "features" / "train.zarr" / "image" / "vit" / "zarr.json"
    group = json.loads(about.read_text())
    for name in ("mode", "upright", "layer"):
        del group["attributes"][name]
    about.write_text(json.dumps(group))
    as_version_1(tmp_path / "run" / "features" / "train.zarr")
    (tmp_path / "run" / "encoders.json").unlink()
    extracted(run_file)
    with pytest.raises(StoreMismatchError, match=NOT_FAST):
        extracted(run_file, FAST)


def test_a_filter_that_torch_has_not_is_refused_in_the_fast_mode(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    processor = tmp_path / "vit" / "preprocessor_config.json"
    settings = json.loads(processor.read_text())
    processor.write_text(json.dumps(settings | {"resample": 1}))  # lanczos
    with pytest.raises(EncoderError, match=r"mode = 'fast' is not there for .* filter 1\. 2 \(bil"):
        extracted(run_file, FAST)
    extracted(run_file)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_encoder_gives_the_same_features_whatever_the_batch(tmp_path: Path) -> None:
    process = in_another_process(EQUAL_FEATURES, tiny.image_encoder(tmp_path / "vit"))
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["4", "1", "3"]


@pytest.mark.slow
def test_compiling_without_a_compiler_is_refused_with_what_to_do(tmp_path: Path) -> None:
    process = in_another_process(
        "load(compile=True)",
        tiny.image_encoder(tmp_path / "vit"),
        CXX="/no/such/compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    message = process.stderr.splitlines()[-1]
    assert message.startswith("features.errors.EncoderError: The image encoder 'vit' cannot be")
    assert "No working C++ compiler found" in message
    assert message.endswith("Install one, or leave out `compile = true`.")


PREPARE = """
import sys
import torch
from features.config import ImageEncoderConfig
from features.encoders import load_image_encoder

def load(**settings):
    config = ImageEncoderConfig(model=sys.argv[1], batch_size=4, **settings)
    return load_image_encoder("vit", config, torch.device("cpu"))
"""
EQUAL_FEATURES = """
eager, compiled = load(), load(compile=True)
assert compiled.columns == eager.columns  # the same fingerprint
images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
for count in (4, 1, 3):
    (expected,) = eager.encode(images[:count])
    (found,) = compiled.encode(images[:count])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    print(count)
"""


def in_another_process(
    program: str, encoder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program without the shape checks of the tests, which torch cannot compile."""
    return subprocess.run(
        [sys.executable, "-c", PREPARE + program, str(encoder)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
