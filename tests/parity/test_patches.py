"""Patch features and attention variants equal the formulas, on real classes of transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from features.config import ImageEncoderConfig, PatchAttention
from features.encoders import load_image_encoder
from features.encoders.patches import PatchEncoder, last_attention, patch_encoder
from features.errors import EncoderError

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
MAPS: dict[PatchAttention, list[tuple[str, str]]] = {
    "plain": [("q", "k")],
    "qq": [("q", "q")],
    "kk": [("k", "k")],
    "vv": [("v", "v")],
    "sclip": [("q", "q"), ("k", "k")],
    "clearclip": [("q", "q")],
}
CLASSES = [
    (Dinov2Config, Dinov2Model),
    (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    (DINOv3ViTConfig, DINOv3ViTModel),
    (ViTConfig, ViTModel),
    (CLIPVisionConfig, CLIPVisionModel),
    (SiglipVisionConfig, SiglipVisionModel),
]


def model_of(config_class: Any, model_class: Any, **options: Any) -> Any:
    """A model of random weights that are large enough for attention to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**SMALL | options)).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def pixels(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def patches(
    folder: Path, model: Any, pooling: str, attention: PatchAttention = "plain", layer: int = -1
) -> PatchEncoder:
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.2],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = ImageEncoderConfig(model=str(folder), pooling=pooling, layer=layer)  # type: ignore[arg-type]  # one of the choices
    encoder = load_image_encoder("eye", config, CPU)
    return patch_encoder(encoder, encoder.columns[0], attention)


def last_block(model: Any, hidden: Tensor, kind: PatchAttention) -> Tensor:
    """The last block of DINOv2 by its formula, and the final normalisation."""
    block = model.encoder.layer[-1]
    own, x = block.attention, block.norm1(hidden)
    heads = own.num_attention_heads
    parts = {
        name: projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name, projection in (("q", own.q_proj), ("k", own.k_proj), ("v", own.v_proj))
    }
    mixed = parts["v"]
    if kind != "maskclip":
        weights = [
            torch.softmax(parts[a] @ parts[b].mT / parts[a].shape[-1] ** 0.5, dim=-1)
            for a, b in MAPS[kind]
        ]
        mixed = sum(weights) @ parts["v"]
    attended = block.layer_scale1(own.o_proj(mixed.transpose(1, 2).flatten(-2)))
    if kind == "clearclip":
        return torch.as_tensor(model.layernorm(attended))
    hidden = hidden + attended
    hidden = hidden + block.layer_scale2(block.mlp(block.norm2(hidden)))
    return torch.as_tensor(model.layernorm(hidden))


@pytest.mark.parametrize("kind", ["maskclip", *MAPS])
def test_each_attention_is_its_formula(kind: PatchAttention, tmp_path: Path) -> None:
    model = model_of(Dinov2Config, Dinov2Model)
    windows = pixels(48, 40)  # not the size of the processor
    with torch.inference_mode():
        before = model(windows, output_hidden_states=True).hidden_states[-2]
        expected = last_block(model, before, kind)[:, 1:].unflatten(1, (6, 5))
    found = patches(tmp_path, model, "mean", kind).encode(windows)
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=2e-3)  # rounded to float16


@pytest.mark.parametrize(("config_class", "model_class"), CLASSES)
def test_other_transformers_compare_queries_with_themselves_too(
    config_class: Any, model_class: Any
) -> None:
    model = model_of(config_class, model_class)
    changed = copy.deepcopy(model)
    own = [module for module in changed.modules() if hasattr(module, "q_proj")][-1]
    own.k_proj = own.q_proj
    with torch.inference_mode():
        plain, expected = model(pixels(32, 32))[0], changed(pixels(32, 32))[0]
        with last_attention(model, "qq"):
            found = model(pixels(32, 32))[0]
        with last_attention(model, "clearclip"):
            clear = model(pixels(32, 32))[0]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(model(pixels(32, 32))[0], plain, rtol=0, atol=0)
    assert not torch.allclose(plain, expected)
    assert clear.isfinite().all()
    assert not torch.allclose(clear, found)


@pytest.mark.parametrize(
    ("config_class", "model_class", "prefix"),
    [(Dinov2Config, Dinov2Model, 1), (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, 5)],
)
def test_the_class_token_of_the_window_stands_before_the_patch_where_the_head_reads_both(
    config_class: Any, model_class: Any, prefix: int, tmp_path: Path
) -> None:
    model = model_of(config_class, model_class)
    windows = pixels(32, 64)
    with torch.inference_mode():
        tokens = model(windows).last_hidden_state
    grid = tokens[:, prefix:].unflatten(1, (4, 8))
    first = tokens[:, 0, None, None].expand(2, 4, 8, 16)
    expected = {
        "cls": grid,
        "mean": grid,
        "pooler": grid,  # of DINOv2 the class token
        "cls+mean": torch.cat([first, grid], dim=-1),
        "mean+max": torch.cat([grid, grid], dim=-1),
    }
    for pooling, features in expected.items():
        found = patches(tmp_path / pooling, model, pooling)
        assert found.patch == 8
        torch.testing.assert_close(found.encode(windows), features, atol=4e-3, rtol=2e-3)


def test_the_mean_of_the_patches_is_what_a_store_holds(tmp_path: Path) -> None:
    found = patches(tmp_path, model_of(ViTConfig, ViTModel), "mean")
    whole = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    picture = whole.to(torch.uint8)
    (stored,) = found.encoder.encode(picture)
    mean = found.encode(found.normalise(picture[0])[None]).mean((1, 2))
    torch.testing.assert_close(mean, stored, atol=2e-3, rtol=2e-3)
    # Standardised with the statistics of the encoder's own processor.
    expected = (picture[0, 2] / 255 - 0.3) / 0.2
    torch.testing.assert_close(found.normalise(picture[0])[2], expected)


def test_the_bundled_encoder_gives_the_cells_of_its_map() -> None:
    config = ImageEncoderConfig(model="bundled:scenes", pooling="pooler")
    encoder = load_image_encoder("scenes", config, CPU)
    found = patch_encoder(encoder, encoder.columns[0])
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    (stored,) = encoder.encode(picture[None])
    grid = found.encode(found.normalise(picture)[None])
    assert grid.shape[3] == stored.shape[1]
    assert found.patch * grid.shape[1] == 64
    torch.testing.assert_close(grid.mean((1, 2)), stored, atol=2e-3, rtol=2e-3)
    with pytest.raises(EncoderError, match="ResNetModel has no attention of queries"):
        patch_encoder(encoder, encoder.columns[0], "qq")


def test_a_layer_before_the_last_is_taken_where_the_head_reads_it(tmp_path: Path) -> None:
    model = model_of(Dinov2Config, Dinov2Model)
    with torch.inference_mode():
        hidden = model(pixels(48, 48), output_hidden_states=True).hidden_states[-2]
    found = patches(tmp_path, model, "cls", layer=-2).encode(pixels(48, 48))
    expected = hidden[:, 1:].unflatten(1, (6, 6))
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=2e-3)
    with pytest.raises(EncoderError, match=r"changes the last block .* are of layer -2"):
        patches(tmp_path, model, "cls", "qq", layer=-2)


def test_mae_keeps_its_patches_in_order_at_other_sizes(tmp_path: Path) -> None:
    model = model_of(ViTMAEConfig, ViTMAEModel, mask_ratio=0.0)
    found = patches(tmp_path, model, "mean")
    one = found.encode(pixels(32, 48))
    assert one.shape == (2, 4, 6, 16)
    torch.testing.assert_close(found.encode(pixels(32, 48)), one, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(ViTConfig, ViTModel), (SiglipVisionConfig, SiglipVisionModel)],
)
def test_a_pooler_of_its_own_has_no_place_for_a_patch(
    config_class: Any, model_class: Any, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=f"pooler of {model_class.__name__} is neither"):
        patches(tmp_path, model_of(config_class, model_class), "pooler")


def test_an_encoder_that_merges_its_patches_is_refused(tmp_path: Path) -> None:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    with pytest.raises(EncoderError, match="SwinModel gives 16 tokens for 8 × 8 patches"):
        patches(tmp_path, SwinModel(config).eval(), "pooler")


def test_raw_pixels_have_no_patches() -> None:
    config = ImageEncoderConfig(model="baseline:pixels", pooling="pooler")
    encoder = load_image_encoder("pixels", config, CPU)
    with pytest.raises(EncoderError, match="neither the mean of its patches"):
        patch_encoder(encoder, encoder.columns[0])


def test_normalised_cosines_do_not_depend_on_the_batch_of_windows(tmp_path: Path) -> None:
    found = patches(tmp_path, model_of(Dinov2Config, Dinov2Model), "cls+mean", "sclip")
    together = F.normalize(found.encode(pixels(48, 48)), dim=-1)
    alone = torch.cat([F.normalize(found.encode(each[None]), dim=-1) for each in pixels(48, 48)])
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)
