"""Position tables that are computed once change no bit of what an encoder gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from features.config import ImageColumnConfig, ImageEncoderConfig
from features.encoders import load_image_encoder
from features.encoders.image import METHOD, fix_position_tables
from features.images import Preprocessing

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 56,  # 4 × 4 patches, where the images here have 2 × 2
    "patch_size": 14,
}
INTERPOLATE = [(Dinov2Config, Dinov2Model), (Dinov2WithRegistersConfig, Dinov2WithRegistersModel)]
CPU = torch.device("cpu")


def model_of(config_class: Any, model_class: Any, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**SMALL | options)).eval()


def pixels(count: int, size: int = 28) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("config_class", "model_class"), INTERPOLATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_stays_the_same_to_the_bit(
    config_class: Any, model_class: Any, dtype: torch.dtype
) -> None:
    model = model_of(config_class, model_class)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features: torch.Tensor = model(images).last_hidden_state
            return features

    before = forward(pixels(3))
    assert fix_position_tables(model, lambda: forward(pixels(1))) == 1
    torch.testing.assert_close(forward(pixels(3)), before, rtol=0, atol=0)


@pytest.mark.parametrize(("config_class", "model_class"), INTERPOLATE)
def test_a_loaded_encoder_interpolates_its_table_no_more(
    config_class: Any, model_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(config_class, model_class)
    model.save_pretrained(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = load_image_encoder("dino", ImageEncoderConfig(model=str(tmp_path)), CPU)
    images = (pixels(3) * 255).to(torch.uint8)
    assert isinstance(encoder.preprocessing, Preprocessing)
    with torch.inference_mode():
        output = model(encoder.preprocessing.normalise(images))

    def interpolated(*_: object) -> torch.Tensor:
        raise AssertionError("the table was computed again")

    monkeypatch.setattr(type(model.embeddings), METHOD, interpolated)
    (found,) = encoder.encode(images, encoder.columns)
    torch.testing.assert_close(found, output.last_hidden_state[:, 0], rtol=0, atol=0)


def test_models_that_do_not_interpolate_are_left_alone() -> None:
    model = model_of(ViTConfig, ViTModel, image_size=28)
    assert fix_position_tables(model, lambda: model(pixels(1))) == 0
    windows = {"depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
    swin = SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, **windows)).eval()
    assert fix_position_tables(swin, lambda: swin(pixels(1, 32))) == 0


def test_a_table_that_depends_on_the_image_is_not_kept() -> None:
    class Embeddings(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images + self.interpolate_pos_encoding(images)

        def interpolate_pos_encoding(self, embeddings: torch.Tensor) -> torch.Tensor:
            return embeddings.mean(0)

    model = Embeddings()
    assert fix_position_tables(model, lambda: model(pixels(1))) == 0
    assert METHOD not in vars(model)


def test_the_pooling_of_a_model_with_registers_leaves_them_out(tmp_path: Path) -> None:
    model = model_of(Dinov2WithRegistersConfig, Dinov2WithRegistersModel, num_register_tokens=3)
    model.save_pretrained(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    also = {"inner": ImageColumnConfig(pooling="mean", layer=1)}
    config = ImageEncoderConfig(model=str(tmp_path), pooling="mean", also=also)
    encoder = load_image_encoder("dino", config, CPU)
    images = (pixels(2) * 255).to(torch.uint8)
    last, inner = encoder.encode(images, encoder.columns)
    assert isinstance(encoder.preprocessing, Preprocessing)
    with torch.inference_mode():
        output = model(encoder.preprocessing.normalise(images), output_hidden_states=True)
    torch.testing.assert_close(last, output.last_hidden_state[:, 4:].mean(1))
    torch.testing.assert_close(inner, output.hidden_states[1][:, 4:].mean(1))
