"""Models of timm by their name alone, as timm itself loads, prepares and runs them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.config import ImageEncoderConfig
from features.encoders import ImageEncoder, load_image_encoder, resolve
from features.encoders.structure import structure_of
from features.errors import EncoderError
from tests import tiny
from tests.conformance.images import PICTURES, TOLERANCE, encoded, unit

try:
    import timm
except (ImportError, RuntimeError) as error:  # no timm, or a torchvision for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (2, 2),
}
CENTER = {"crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3)}
SQUASH = {"crop_pct": 1.0, "crop_mode": "squash", "std": (0.2, 0.3, 0.4)}
BORDER = {"crop_pct": 0.8, "crop_mode": "border", "interpolation": "bilinear"}
SMALL = {"input_size": (3, 64, 64)}
# Architecture, its arguments, how pictures are prepared, and the tokens before its patches; None
# where it has none that are known.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int | None]] = {
    "vit": ("vit_tiny_patch16_224", VIT, CENTER, 1),
    "vit_mean": (
        "vit_base_patch16_224",
        VIT | {"global_pool": "avg", "class_token": False},
        SQUASH,
        0,
    ),
    "vit_registers": ("vit_small_patch14_reg4_dinov2", VIT, BORDER, 5),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT, CENTER, 2),
    "deit3": ("deit3_small_patch16_224", VIT, SQUASH, 1),
    "beit": ("beit_base_patch16_224", VIT, CENTER, 1),
    "eva02": ("eva02_tiny_patch14_224", VIT | {"mlp_ratio": 2}, BORDER, 1),
    "dinov3": ("vit_small_patch16_dinov3", VIT, SMALL | CENTER, 5),
    "siglip": ("vit_base_patch16_siglip_224", VIT, SQUASH, 0),
    "clip": ("vit_base_patch32_clip_224", VIT, CENTER, 1),
    "pe": ("vit_pe_core_tiny_patch16_384", VIT, SQUASH, 1),
    "aimv2": ("aimv2_large_patch14_224", VIT, CENTER, 0),
    "cait": ("cait_xxs24_224", VIT, CENTER, 1),
    "xcit": ("xcit_nano_12_p16_224", VIT | {"patch_size": 16}, CENTER, 1),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, CENTER, 0),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, CENTER, 0),
    "convnext": ("convnext_atto", {"depths": (1,) * 4, "dims": (8, 8, 8, 16)}, SMALL | CENTER, 0),
    "resnet": ("resnet18", {"layers": (1,) * 4, "channels": (8, 8, 8, 16)}, SMALL | BORDER, 0),
    "mobilenetv3": ("mobilenetv3_small_050", {}, SMALL, 0),
    "edgenext": ("edgenext_xx_small", {}, SMALL, 0),
    "hiera": (
        "hiera_tiny_224",
        {"img_size": (32, 32), "embed_dim": 8, "num_heads": 1, "stages": (1,) * 4},
        CENTER,
        None,
    ),
    "levit": (
        "levit_128s",
        {"img_size": 64, "embed_dim": (16,) * 3, "num_heads": (2,) * 3, "depth": (1,) * 3},
        CENTER,
        None,
    ),
}
FAST = ("vit_registers", "swin", "resnet")


def write(folder: Path, name: str) -> Path:
    """Write a folder as timm does."""
    architecture, arguments, data, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=7, **arguments).eval()
        for key, weight in model.named_parameters():
            if weight.ndim < 2:
                torch.nn.init.normal_(weight, mean=float("norm" in key), std=0.1)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, data_config=data)
    return folder


def loaded(folder: Path, **settings: Any) -> ImageEncoder:
    config = ImageEncoderConfig(model=f"timm:{folder}", precision="float32", **settings)
    return load_image_encoder("x", config, torch.device("cpu"))


def reference(folder: Path, prefix: int | None) -> list[torch.Tensor]:
    """What timm gives: its vector, then the mean of its patches."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pictures = torch.stack([transform(tiny.picture(*each)) for each in PICTURES])
    with torch.inference_mode():
        outputs = [model(pictures)]
        if prefix is not None:
            tokens = model.forward_features(pictures)
            is_last = getattr(model, "output_fmt", "") == "NHWC"
            tokens = tokens.flatten(1, 2) if is_last else tokens
            tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
            outputs.append(tokens[:, prefix:].mean(1))
    return outputs


def check(folder: Path, name: str) -> None:
    prefix = MODELS[name][3]
    write(folder, name)
    also = {"mean": {"pooling": "mean"}}
    if prefix is None:
        with pytest.raises(EncoderError, match="Use pooling `pooler`"):
            loaded(folder, pooling="mean")
        also = {}
    encoder = loaded(folder, also=also)
    assert encoder.columns[0].settings.pooling == "pooler"
    for found, right in zip(encoded(encoder), reference(folder, prefix), strict=True):
        np.testing.assert_allclose(unit(found), unit(right), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAST)
def test_a_model_of_timm_by_its_name_is_what_timm_gives(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(FAST)))
def test_every_model_of_timm_by_its_name_is_what_timm_gives(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


@pytest.mark.parametrize("name", ["vit", "vit_registers", "eva02", "dinov3"])
def test_tokens_that_timm_counts_before_the_patches_do_not_depend_on_the_picture(
    tmp_path: Path, name: str
) -> None:
    model = loaded(write(tmp_path, name)).model
    size = 64 if name == "dinov3" else 32
    with torch.inference_mode():
        output = model(torch.randn(2, 3, size, size), output_hidden_states=True)
    first = output.hidden_states[0]
    structure = structure_of(model.config)
    assert structure is not None
    alike = (first[0] == first[1]).all(dim=1).nonzero().flatten().tolist()
    assert alike == list(range(structure.prefix or 0))


def test_every_block_of_a_transformer_is_a_layer(tmp_path: Path) -> None:
    """As platonic-rep takes them: the class token of every block."""
    write(tmp_path, "vit")
    also = {f"block{number}": {"pooling": "cls", "layer": number} for number in (1, 2)}
    encoder = loaded(tmp_path, pooling="cls", layer=0, also=also)
    found = encoded(encoder)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pictures = torch.stack([transform(tiny.picture(*each)) for each in PICTURES])
    with torch.inference_mode():
        blocks = model.forward_intermediates(
            pictures, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    for ours, (_, prefix) in zip(found[1:], blocks, strict=True):
        np.testing.assert_allclose(ours, prefix[:, 0], atol=1e-6)
    with pytest.raises(EncoderError, match=r"layer = -2 .* Set `pooling`"):
        loaded(tmp_path, layer=-2)
    with pytest.raises(EncoderError, match="has no layer 3"):
        loaded(tmp_path, layer=3, pooling="cls")


def test_the_plan_tells_the_transform_and_where_it_is_from(tmp_path: Path) -> None:
    write(tmp_path, "vit")
    plan = resolve(ImageEncoderConfig(model=str(tmp_path)))  # timm's layout needs no prefix
    assert plan.decisions["crop_pct"] == (0.9, "config.json")
    assert plan["trunk"] == "vit_tiny_patch16_224"
    assert list(plan.files) == ["config.json"]
    fingerprint = loaded(tmp_path).columns[0].fingerprint
    assert fingerprint["versions"]["timm"] == timm.__version__
    assert fingerprint["model"] == f"timm:{tmp_path.name}"


def _without(folder: Path, *names: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def _changed(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: _without(folder, "norm.weight"), 'Missing key.*"norm.weight"'),
        (lambda folder: _without(folder, "head.weight"), 'Missing key.*"head.weight"'),
        (lambda folder: _changed(folder, architecture="vit_x"), "'vit_x', which this timm has not"),
        (
            lambda folder: _changed(folder, model_args=VIT | {"embed_dim": 24}),
            "cannot be loaded: .* size mismatch",
        ),
        (
            lambda folder: _changed(folder, model_args=VIT | {"checkpoint_path": "x.pth"}),
            "cannot be loaded: TypeError",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "x.bin"),
            "has no model.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs 1"),
            "is a pointer of Git LFS",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, damage: Any, words: str
) -> None:
    write(tmp_path, "vit")
    damage(tmp_path)
    with pytest.raises(EncoderError) as caught:
        loaded(tmp_path)
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_name_that_timm_has_not_is_refused() -> None:
    with pytest.raises(EncoderError, match="no pretrained weights of the name 'nothing'"):
        resolve(ImageEncoderConfig(model="timm:nothing"))


@pytest.mark.slow
def test_the_check_of_an_encoder_compares_with_timm(tmp_path: Path) -> None:
    from tests.commands import sail

    (plan,) = json.loads(sail("encoders", write(tmp_path, "vit"), "--check", "--json").stdout)
    assert plan["check"]["equal"] is True
    assert plan["check"]["reference"] == f"timm {timm.__version__}"
