"""The arithmetic of `sail plan` against published numbers, real heads and hand calculation."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from align.config import HeadConfig
from align.heads import build_head
from features.config import ImageEncoderConfig, TextEncoderConfig
from features.storage.column import create_column
from pipeline.planning.estimate import (
    GPUS,
    Phase,
    bottleneck,
    column_bytes,
    column_hours,
    head_flops,
    hours,
    training_flops,
)
from pipeline.planning.sizes import build_model, image_size, text_size
from tests import tiny

DINO = ImageEncoderConfig(model="facebook/dinov2-large")


def parameters(model: str) -> int:
    built, _ = build_model(model, None)
    return sum(weight.numel() for weight in built.parameters())


def test_released_encoders_have_their_published_parameters() -> None:
    assert parameters("facebook/dinov2-large") == pytest.approx(304.4e6, rel=0.001)
    assert parameters("nvidia/NV-Embed-v2") == pytest.approx(7.85e9, rel=0.002)
    assert parameters("bundled:minilm") == pytest.approx(22.7e6, rel=0.01)


def test_dinov2_large_has_its_published_work() -> None:
    flops = image_size("dino", DINO).flops
    # A ViT-L/14 at 224 pixels: 81 billion multiplications (timm), two FLOPs each.
    assert flops
    assert flops(1) == pytest.approx(2 * 81.1e9, rel=0.01)


def test_flops_are_those_that_torch_counts_in_a_real_model(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    folder = tiny.image_encoder(tmp_path / "vit")
    size = image_size("vit", ImageEncoderConfig(model=str(folder)))
    assert (size.dims, size.found_in) == ({"vit": 16}, "its config.json")
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 16, 16))
    assert size.flops
    assert size.flops(1) == counter.get_total_flops()


def test_a_local_text_encoder_is_sized_by_its_config(tmp_path: Path) -> None:
    size = text_size(TextEncoderConfig(model=str(tiny.text_encoder(tmp_path / "bert"))))
    assert size.dims == {"": 12}
    # One layer: four matrices of 12 x 12 and two of 12 x 24; each token meets each in 12 numbers,
    # twice. The pooler is one more matrix, for one token.
    assert size.flops
    assert size.flops(3) == 2 * (4 * 144 + 2 * 288) * 3 + 4 * 12 * 3**2 + 2 * 144


def test_a_folder_that_is_no_model_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert text_size(TextEncoderConfig(model=str(tmp_path))).dims == {"": None}
    assert image_size("eye", ImageEncoderConfig(model=str(tmp_path))).dims == {"eye": None}


def test_an_encoder_that_is_not_here_and_not_known_has_no_size() -> None:
    assert image_size("eye", ImageEncoderConfig(model="someone/else")).dims == {"eye": None}
    assert text_size(TextEncoderConfig(model="someone/else")).dims == {"": None}


def test_further_columns_of_an_encoder_have_the_length_of_their_pooling() -> None:
    settings = ImageEncoderConfig.model_validate(
        {"model": "facebook/dinov2-large", "also": {"both": {"pooling": "cls+mean"}}}
    )
    assert image_size("dino", settings).dims == {"dino": 1024, "both": 2048}


BEGINS_WITH = {
    "glu": ["layers.0.gated", "layers.0.skip"],
    "star": ["f1", "f2"],
    "mlp": ["up"],
    "linear": ["linear"],
}
"""Matrices that frozen features go into."""


@pytest.mark.parametrize("kind", BEGINS_WITH)
@pytest.mark.parametrize("feature_dim", [8, 12])
def test_work_of_a_head_is_three_forward_passes_less_the_gradient_of_the_features(
    kind: str, feature_dim: int
) -> None:
    config = HeadConfig.model_validate({"kind": kind, "dim": 8, "depth": 3})
    weights = dict(build_head(feature_dim, **dict(config)).named_parameters())
    every = sum(weight.numel() for weight in weights.values() if weight.ndim == 2)
    begins_with = [f"{name}.weight" for name in BEGINS_WITH[kind]]
    first = sum(weights[name].numel() for name in begins_with if name in weights)
    assert head_flops(feature_dim, config) == 6 * every - 2 * first


@pytest.mark.parametrize("kind", tiny.TRAINED_HEADS)
def test_work_of_every_head_is_what_torch_counts_when_it_computes(kind: str) -> None:
    config = HeadConfig.model_validate({"kind": kind, "dim": 6, "depth": 2})
    counted = []
    for rows in (3, 8):
        with FlopCounterMode(display=False) as counter:
            build_head(10, **dict(config))(torch.randn(rows, 10)).sum().backward()
        counted.append(counter.get_total_flops())
    assert head_flops(10, config) * 5 == counted[1] - counted[0]


def test_work_of_a_step_is_that_of_both_heads_and_of_the_logits() -> None:
    assert training_flops(40, 26, fields=2, batch=7, dim=3) == 40 + 2 * 26 + 6 * 7 * 2 * 3


def test_bytes_of_a_column_are_those_on_disk(tmp_path: Path) -> None:
    import numpy as np
    import zarr

    from features.storage.column import Column

    create_column(zarr.create_group(tmp_path).create_group("image/eye"), 20, 3, 8)
    column = Column(tmp_path, "image/eye")
    for chunk in range(3):
        rows = column.chunk_rows(chunk)
        column.write(chunk, np.zeros((rows, 3), np.float16), np.ones(rows, np.uint8))
    files = [*tmp_path.rglob("c/*/0"), *tmp_path.rglob("status/c/*")]
    assert column_bytes(20, 3, 8) == sum(file.stat().st_size for file in files if file.is_file())


def test_a_column_takes_its_slowest_phase_and_shares_the_cores() -> None:
    read, decode = Phase("read", 1.0, False), Phase("decode", 2.0, True)
    assert column_hours([read, decode, Phase("encode", 3.0, False)]) == 3.0
    assert column_hours([read, decode, Phase("encode", 3.0, True)]) == 5.0
    assert bottleneck([read, decode]) == "decode"
    assert (column_hours([]), bottleneck([])) == (0.0, None)


def test_23_million_images_take_a_few_hours_on_an_h100() -> None:
    flops = image_size("dino", DINO).flops
    assert flops
    work = 23e6 * flops(1)
    assert hours(work, 0.4 * GPUS["H100"].peak) == pytest.approx(2.6, abs=0.1)
