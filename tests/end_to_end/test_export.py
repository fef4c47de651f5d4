"""A run that is handed over: what others load gives what the run itself gives."""

import io
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.encoders.checkpoint import BUNDLED_SCENES
from features.errors import EncoderError, EvaluationError
from pipeline.export.exports import export_run
from pipeline.interrupt import StopRequest
from pipeline.python import load_aligned
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny
from tests.commands import sail, the_error_of
from tests.fresh_environment import fresh_environment, run_in
from tests.photographs import sideways
from tests.trained import trained

TEXTS = ["a red circle", "three blue squares left of a green star", "?"]
BUNDLED = [
    "encoders.image={scenes = {model = 'bundled:scenes', pooling = 'pooler'}}",
    "encoders.text={minilm = {model = 'bundled:minilm'}}",
    "align.head.depth=8",
]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the encoders of the demo."""
    return trained(tmp_path_factory.mktemp("bundled"), *BUNDLED)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on encoders in folders, whose licence nobody stated."""
    return trained(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(sideways(tiny.picture(number), 6))
    return sorted(folder.glob("*.jpg"))


def change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(import json\n.*?)```", card, re.DOTALL)
    return str(code)


def embedded_by_the_card(
    out: Path, photos: list[Path], run: Callable[[str], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Run the code of a card as it stands, then let it embed some images and texts."""
    shutil.copy(photos[0], out / "photo.jpg")
    files = [str(path) for path in photos]
    code = code_of((out / "README.md").read_text(encoding="utf-8"))
    code += f"import numpy\nnumpy.save('image.npy', encode_image(*{files!r}).numpy())\n"
    run(code + f"numpy.save('text.npy', encode_text(*{TEXTS!r}).numpy())\n")
    return np.load(out / "image.npy"), np.load(out / "text.npy")


def check_equal(source: Path, photos: list[Path], found: tuple[np.ndarray, np.ndarray]) -> None:
    aligned = load_aligned(source, device="cpu")
    image, text = found
    np.testing.assert_allclose(image, aligned.encode_image(photos), atol=1e-5, rtol=0)
    np.testing.assert_allclose(text, aligned.encode_text(TEXTS), atol=1e-5, rtol=0)
    assert np.abs(np.diff(image, axis=0)).max() > 1e-3  # the images are told apart


@pytest.mark.slow
def test_the_card_loads_it_where_only_torch_transformers_safetensors_and_pillow_are(
    bundled: Path, photos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert sail("export", bundled, "--to", "hf", "--out", out).stdout == f"{out}\n"
    fresh = fresh_environment(
        tmp_path / "fresh", "torch", "transformers", "safetensors", "pillow", "numpy"
    )
    refused = "import importlib.util as u; print([u.find_spec(n) for n in ('zarr', 'features')])"
    assert run_in(fresh, refused, cwd=out) == "[None, None]\n"
    found = embedded_by_the_card(out, photos, lambda code: run_in(fresh, code, cwd=out))
    check_equal(bundled, photos, found)
    check_equal(out, photos, found)


@pytest.mark.parametrize(
    "overrides",
    [
        ["align.head.kind=star", "encoders.image.vit.pooling=cls+mean"],
        ["encoders.image.vit.pooling=mean+max"],
        ["align.head.kind=mlp", "encoders.image.vit.upright=true"],
        [
            "align.head.kind=linear",
            "encoders.image.vit.pooling=mean",
            "encoders.image.vit.layer=-2",
        ],
        ["encoders.text.bert.pooling=last", "encoders.text.bert.instruction=Say: "],
        [
            "encoders.text.bert.pooling=cls",
            "encoders.text.bert.max_length=6",
            "processor=DINOv3ViT",
        ],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_the_card_is_right_for_every_head_and_pooling(
    overrides: list[str], photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = [each.partition("=")[2] for each in overrides if each.startswith("processor=")]
    run_file = tiny.world(tmp_path / "world", rows=24)
    settings = tmp_path / "world" / "vit" / "preprocessor_config.json"
    for name in processor:
        settings.write_text(settings.read_text().replace("ViTImage", f"{name}Image"))
    config = load_config(str(run_file), [each for each in overrides if each[:9] != "processor"])
    extract(config, StopRequest())
    align_run(config, StopRequest())
    out = export_run(config.run.dir, "hf", tmp_path / "out", with_encoders=True)
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(out)
    found = embedded_by_the_card(out, photos, lambda code: exec(code, {}))
    check_equal(config.run.dir, photos, found)


def test_a_column_of_also_is_handed_over_as_the_encoder_that_it_is(
    photos: list[Path], tmp_path: Path
) -> None:
    also = "encoders.image.vit.also={flat = {pooling = 'mean'}}"
    run = trained(tmp_path / "world", also, "align.image=flat")
    out = export_run(run, "hf", tmp_path / "out", with_encoders=True)
    expected = load_aligned(run, device="cpu").encode_image(photos)
    np.testing.assert_array_equal(load_aligned(out, device="cpu").encode_image(photos), expected)


def test_weights_of_an_unknown_licence_stay_and_the_folder_says_which_they_are(
    local: Path, photos: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = export_run(local, "hf", tmp_path / "out")
    assert "licence is not known" in caplog.text
    assert sorted(path.name for path in out.rglob("*.safetensors")) == ["model.safetensors"]
    card = (out / "README.md").read_text(encoding="utf-8")
    sha256 = load_aligned(local).checkpoint.image["fingerprint"]["weights_sha256"]
    assert "are not in `image_encoder`" in card
    assert sha256 in card
    for name, folder in [("vit", "image_encoder"), ("bert", "text_encoder")]:
        shutil.copy(local.parent / name / "model.safetensors", out / folder)  # as the card says
    found = load_aligned(out, device="cpu").encode_image(photos)
    np.testing.assert_array_equal(found, load_aligned(local, device="cpu").encode_image(photos))
    change_last_byte(out / "image_encoder" / "model.safetensors")
    with pytest.raises(EvaluationError, match=r"weights_sha256 = .* was expected\. Put the"):
        load_aligned(out, device="cpu").encode_image(photos)


def test_an_encoder_of_the_hub_is_named_by_revision_and_sha256_unless_its_weights_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own cache stands in for the hub; it is what offline use reads."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--us--scenes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(BUNDLED_SCENES, repository / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = "encoders.image={scenes = {model = 'us/scenes', pooling = 'pooler'}}"
    run = trained(tmp_path / "world", hub, *BUNDLED[1:])
    out = export_run(run, "hf", tmp_path / "out")
    exported = json.loads((out / "config.json").read_text(encoding="utf-8"))["exported"]
    named = exported["encoders"]["image"]["scenes"]
    assert (named["model"], named["revision"]) == ("us/scenes", revision)
    assert not list((out / "image_encoder").glob("*.safetensors"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f'from_pretrained("us/scenes", revision="{revision}", dtype' in card
    assert "base_model: [us/scenes]" in card
    assert load_aligned(out, device="cpu").encode_image([]).shape[0] == 0
    out = export_run(run, "hf", tmp_path / "out", with_encoders=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    photo = tiny.encoded(tiny.picture(1))
    assert np.isfinite(load_aligned(out, device="cpu").encode_image([photo])).all()


def test_changed_weights_are_not_handed_over(tmp_path: Path) -> None:
    run = trained(tmp_path / "world")
    change_last_byte(tmp_path / "world" / "vit" / "model.safetensors")
    with pytest.raises(EncoderError, match=r"have sha256 .* were expected\. Put them back"):
        export_run(run, "hf", tmp_path / "out", with_encoders=True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_exports_at_the_same_time_leave_one_whole_folder(bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: export_run(bundled, "hf", out), range(4)))
    assert len(list(out.rglob("*.safetensors"))) == 3
    assert not list(tmp_path.glob(".*"))
    assert load_aligned(out, device="cpu").encode_text(TEXTS).shape == (3, 8)


def test_an_exported_folder_embeds_files_and_has_nothing_to_search(
    bundled: Path, photos: list[Path], tmp_path: Path
) -> None:
    out = export_run(bundled, "hf", tmp_path / "out")
    sail("embed", out, "--images", photos[0].parent, "--out", tmp_path / "image.npy")
    expected = load_aligned(bundled, device="cpu").encode_image(photos)
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), expected, atol=1e-6)
    message = the_error_of(sail("search", out, "a star", expect=1))
    assert re.search(r"is an exported model, without data\. .* was expected\. Use the run", message)


def test_what_cannot_be_exported_is_said(bundled: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    Image.new("RGB", (1, 1)).save(buffer := io.BytesIO(), "PNG")
    (taken / "mine.png").write_bytes(buffer.getvalue())
    message = the_error_of(sail("export", bundled, "--to", "hf", "--out", taken, expect=1))
    assert re.search(r"is there already, and is no exported model\. .* was expected\.", message)
    assert (taken / "mine.png").is_file()
    message = the_error_of(sail("export", tmp_path, "--to", "hf", expect=1))
    assert re.search(r"has no config\.toml: .* was expected\. Correct the path", message)
    pixels = "encoders.image={pixels = {model = 'baseline:pixels', pooling = 'pooler'}}"
    run = trained(tmp_path / "baseline", pixels, "align.start=random")
    message = the_error_of(sail("export", run, "--to", "hf", expect=1))
    assert re.search(r"baseline:pixels, which has no files\. .* was expected,", message)
