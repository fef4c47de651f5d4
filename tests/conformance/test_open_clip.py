"""Models of open_clip by their name alone, as open_clip itself loads, prepares and runs them."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import ImageEncoder, load_image_encoder, load_text_encoder, resolve
from features.errors import EncoderError
from features.store import FeatureStore
from pipeline.python import load_aligned
from tests import tiny
from tests.commands import sail
from tests.conformance.images import PICTURES, TOLERANCE, encoded, unit

try:
    import open_clip
except (ImportError, RuntimeError) as error:  # not there, or a torchvision for another torch
    pytest.skip(f"open_clip cannot be imported: {error}", allow_module_level=True)

WEIGHTS = "open_clip_model.safetensors"
VISION: dict[str, Any] = {
    "image_size": 32,
    "layers": 2,
    "width": 16,
    "head_width": 8,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "context_length": 12,
    "vocab_size": 49408,
    "width": 16,
    "heads": 2,
    "layers": 2,
}
TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
OWN_TOKENS = {"hf_tokenizer_name": "any/tokenizer", "vocab_size": 40, "pool_type": "last"}
# What model_cfg and preprocess_cfg have beside the smallest ones.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({}, {}),
    "quick_gelu": ({"quick_gelu": True}, {"interpolation": "bilinear"}),
    "siglip": (
        {"init_logit_bias": -10, "custom_text": True, "text_cfg": TEXT | OWN_TOKENS},
        {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
    ),
    "timm": ({"vision_cfg": TIMM}, {"resize_mode": "longest"}),
    "mean_pooled": ({"vision_cfg": VISION | {"pool_type": "avg"}}, {"mean": [0.1, 0.2, 0.3]}),
    "coca": (
        {
            "multimodal_cfg": TEXT | {"mlp_ratio": 2},
            "vision_cfg": VISION
            | {"attentional_pool": True, "output_tokens": True}
            | {"attn_pooler_heads": 2},
            "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
            "custom_text": True,
        },
        {},
    ),
}
PROMPTS = [
    *("a red circle", "The Green star, left of a BLUE square.", ""),
    *("small " * 30, "naïve & <b>"),
]


def write(folder: Path, name: str) -> Path:
    """Write a folder as open_clip's push_to_hf_hub does."""
    model_cfg, preprocess = MODELS[name]
    config: dict[str, Any] = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT} | model_cfg
    folder.mkdir(parents=True, exist_ok=True)
    if config["text_cfg"].get("hf_tokenizer_name"):
        tiny.text_encoder(folder)
        for path in [folder / "config.json", folder / "model.safetensors"]:
            path.unlink()
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    return folder


def images(folder: Path, **settings: Any) -> ImageEncoder:
    config = ImageEncoderConfig(model=f"open_clip:{folder}", precision="float32", **settings)
    return load_image_encoder("clip", config, torch.device("cpu"))


def texts(folder: Path, **settings: Any) -> Any:
    config = TextEncoderConfig(model=f"open_clip:{folder}", precision="float32", **settings)
    return load_text_encoder("clip", config, torch.device("cpu"))


def check(folder: Path, name: str) -> None:
    write(folder, name)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    pictures = torch.stack([transform(tiny.picture(*each)) for each in PICTURES])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    with torch.inference_mode():
        expected = model.encode_image(pictures), model.encode_text(tokens)
    found = encoded(images(folder))[0]
    np.testing.assert_allclose(unit(found), unit(expected[0]), atol=TOLERANCE, rtol=0)
    found = torch.from_numpy(texts(folder).encode(PROMPTS))
    np.testing.assert_allclose(unit(found), unit(expected[1]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_towers_by_their_name_are_what_open_clip_gives(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"clip", "siglip"}))
def test_every_kind_of_tower_is_what_open_clip_gives(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


def test_the_plan_says_what_the_files_say(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    plan = resolve(TextEncoderConfig(model=str(tmp_path)))  # the layout needs no prefix
    assert plan.decisions["max_length"] == (12, "open_clip_config.json")
    assert {"open_clip_config.json", "tokenizer.json"} <= plan.files.keys()
    image = resolve(ImageEncoderConfig(model=str(tmp_path)))
    assert image.decisions["resize_mode"] == ("squash", "open_clip_config.json")
    assert image["pooling"] == "projection"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "mean"}, "has pooling = 'mean', .* decides that by itself"),
        ({"max_length": 5}, "has max_length = 5"),
        ({"dim": 4}, "has dim = 4"),
    ],
)
def test_what_open_clip_decides_itself_cannot_be_set(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    write(tmp_path, "clip")
    with pytest.raises(EncoderError, match=words):
        texts(tmp_path, **settings)
    with pytest.raises(EncoderError, match="its projection alone can be had"):
        images(tmp_path, also={"other": {"pooling": "mean"}})


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "open_clip_config.json"
    described = json.loads(path.read_text())
    described["model_cfg"] |= changes
    path.write_text(json.dumps(described))


def _shorten(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["ln_final.weight"]
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_shorten, 'cannot be loaded: .*"ln_final.weight"'),
        (lambda folder: _change(folder, embed_dim=13), "cannot be loaded: .*size mismatch"),
        (lambda folder: _change(folder, vision_cfg=None), "lacks what it should say"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "x.bin"), f"has no {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"1234"), "has no header of safetensors"),
        (
            lambda folder: (folder / "open_clip_config.json").write_text("{}"),
            "model_cfg with vision_cfg and text_cfg was",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, damage: Any, words: str
) -> None:
    write(tmp_path, "clip")
    damage(tmp_path)
    for load in (images, texts):
        with pytest.raises(EncoderError) as caught:
            load(tmp_path)
        assert re.search(words, str(caught.value))
        assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    described = tmp_path / "open_clip_config.json"
    config = json.loads(described.read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]  # so that it is OpenAI's
    described.write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="cannot encode a text: IndexError"):
        texts(tmp_path)


RUN_FILE = """\
run.dir = "run"
data.train = { kind = "webdataset", path = "shards/train-*.tar" }
data.test = { kind = "webdataset", path = "shards/test-0.tar", class_names = "shards/classes.txt" }
encoders.image.clip.model = "open_clip:clip"
encoders.text.clip.model = "open_clip:clip"
align.head = { kind = "none", dim = 12 }
align.batch_size = 8
align.steps = 1
eval.zero_shot = ["test"]
eval.bootstrap = 10
"""


@pytest.mark.slow
def test_zero_shot_from_a_store_is_open_clip_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP itself as a baseline, by a run file of ten lines."""
    monkeypatch.chdir(tmp_path)
    tiny.world(tmp_path, rows=24)
    write(tmp_path / "clip", "clip")
    (tmp_path / "clip.toml").write_text(RUN_FILE)
    for stage in ("extract", "align", "eval"):
        sail(stage, "clip.toml")
    results = json.loads(Path("run/eval/results.json").read_text())["results"]
    found = {each["metric"]: each for each in results if each["task"] == "zero_shot"}

    model, _, transform = open_clip.create_model_and_transforms("local-dir:clip")
    model.eval()
    rows = tiny.samples(16, first=1000)
    pictures = [Image.open(io.BytesIO(data)) for name, data in rows if name.endswith(".jpg")]
    labels = np.array([json.loads(data)["label"] for name, data in rows if name.endswith("json")])
    names = Path("shards/classes.txt").read_text().splitlines()
    prompts = open_clip.get_tokenizer("local-dir:clip")([f"a photo of a {n}." for n in names])
    with torch.inference_mode():
        images = model.encode_image(torch.stack([transform(each) for each in pictures]))
        logits = unit(images) @ unit(model.encode_text(prompts)).T
    chosen = logits.argmax(axis=1)
    assert found["top1"]["n"] == len(labels)
    assert found["top1"]["value"] == (chosen == labels).mean()
    assert found["top1"]["protocol"]["templates"] == ["a photo of a {}."]
    aligned = load_aligned("run", device="cpu")
    ours = FeatureStore.open(Path("run/features/test.zarr")).column("image/clip").read(0, 16)
    ours = unit(torch.from_numpy(np.asarray(ours, dtype=np.float32)))
    words = torch.from_numpy(aligned.encode_text([f"a photo of a {n}." for n in names]))
    cosines = ours @ unit(words).T
    np.testing.assert_allclose(cosines, logits, atol=2e-3)  # a store holds float16
    assert (cosines.argmax(axis=1) == chosen).all()


@pytest.mark.slow
def test_the_check_of_an_encoder_compares_with_open_clip(tmp_path: Path) -> None:
    plans = json.loads(sail("encoders", write(tmp_path, "siglip"), "--check", "--json").stdout)
    assert [each["kind"] for each in plans] == ["image", "text"]
    assert all(each["check"]["equal"] for each in plans)
    assert plans[0]["check"]["reference"] == f"open_clip {open_clip.__version__}"
