"""The aligned image encoder as the vision tower of a LLaVA."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, LlamaConfig, LlavaForConditionalGeneration

from features.errors import EncoderError
from pipeline.export.exports import export_run
from pipeline.export.llava import llava_config
from pipeline.python import load_aligned
from tests import tiny
from tests.benchmarks import llava as benchmark
from tests.commands import sail, the_error_of
from tests.photographs import sideways
from tests.trained import trained

IMAGE_TOKEN = 31


def llava(folder: Path, **changes: Any) -> Any:
    """A LLaVA with a tiny language model of random weights on an exported tower."""
    language_model = LlamaConfig(
        vocab_size=32,
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = llava_config(AutoConfig.from_pretrained(folder), language_model, image_token=31)
    for name, value in changes.items():
        setattr(config, name, value)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = AutoModel.from_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tower(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, "llava", tmp_path_factory.mktemp("out") / "llava", with_encoders=True)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_tower_gives_the_embedding_of_the_image_and_then_of_its_patches(
    run: Path, tower: Path, pixels: torch.Tensor
) -> None:
    aligned = load_aligned(run, device="cpu")
    tokens = aligned.image_encoder.model(pixels).last_hidden_state  # class token and 2 × 2 patches
    expected = torch.stack([aligned.model.image_head(image) for image in tokens])
    found = AutoModel.from_pretrained(tower)(pixels, output_hidden_states=-1)
    torch.testing.assert_close(found.hidden_states[-1], expected, atol=1e-5, rtol=0)
    model = llava(tower)
    assert model.config.vision_feature_layer == -1
    assert model.model.multi_modal_projector.linear_1.in_features == 8
    projected = model.get_image_features(pixels, return_dict=True).pooler_output
    patches = model.model.multi_modal_projector(expected[:, 1:])
    torch.testing.assert_close(torch.stack(list(projected)), patches, atol=1e-5, rtol=0)


@torch.no_grad()
def test_layers_and_the_first_token_are_those_that_llava_selects(
    run: Path, tower: Path, pixels: torch.Tensor
) -> None:
    aligned = load_aligned(run, device="cpu")
    states = aligned.image_encoder.model(pixels, output_hidden_states=True).hidden_states
    before = torch.stack([aligned.model.image_head(image) for image in states[-2]])
    model = llava(tower, vision_feature_layer=-2, vision_feature_select_strategy="full")
    projected = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
    expected = model.model.multi_modal_projector(before)
    torch.testing.assert_close(projected, expected, atol=1e-5, rtol=0)
    assert llava(tower, vision_feature_layer=[-2, -1]).model.vision_tower.config.hidden_size == 8
    with pytest.raises(EncoderError, match=r"vision_feature_layer is -9\. .* was expected\."):
        llava(tower, vision_feature_layer=-9).get_image_features(pixels)


def test_a_saved_llava_loads_again_and_its_tower_can_be_tuned(
    tmp_path: Path, pixels: torch.Tensor
) -> None:
    """A star head forms no gradient of its input in training; behind a tower it must."""
    overrides = ["align.head.kind=star", "encoders.image.vit.pooling=cls+mean"]
    run = trained(tmp_path / "world", *overrides)
    model = llava(export_run(run, "llava", tmp_path / "out", with_encoders=True))
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * 4, 5, 6]] * 2)
    loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
    loss.backward()
    gradient = model.model.vision_tower.encoder.embeddings.cls_token.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    model.save_pretrained(tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        repeated = again(input_ids=ids, pixel_values=pixels, labels=ids).loss
    torch.testing.assert_close(repeated, loss.detach())


@pytest.fixture(scope="module")
def demo_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenes = "encoders.image={scenes = {model = 'bundled:scenes', pooling = 'pooler'}}"
    folder = tmp_path_factory.mktemp("demo")
    return export_run(trained(folder / "world", scenes), "llava", folder / "out")


def test_the_encoder_of_the_demo_has_no_class_token_and_gives_all_its_patches(
    demo_tower: Path,
) -> None:
    model = llava(demo_tower)
    assert model.config.vision_feature_select_strategy == "full"
    projected = model.get_image_features(torch.zeros(1, 3, 64, 64), return_dict=True).pooler_output
    assert projected[0].shape == (16, 20)


@pytest.mark.parametrize("upright", [True, False])
def test_the_card_gives_a_turned_photograph_the_embedding_that_the_run_gives_it(
    upright: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "world", f"encoders.image.vit.upright={str(upright).lower()}")
    folder = export_run(run, "llava", tmp_path / "out", with_encoders=True)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = blocks[-1].replace("path/of/this/folder", str(folder))
    monkeypatch.chdir(tmp_path)
    found = {}
    for turn in (1, 6):  # as it is, and a phone that was held upright
        Path("photo.jpg").write_bytes(sideways(tiny.picture(0), turn))
        names: dict[str, Any] = {}
        exec(code, names)
        found[turn] = F.normalize(names["tokens"][0, 0], dim=0).detach().numpy()
        expected = load_aligned(run, device="cpu").encode_image(["photo.jpg"])[0]
        np.testing.assert_allclose(found[turn], expected, atol=2e-3)  # features are not rounded
    assert (np.abs(found[6] - found[1]).max() > 1e-2) == upright


@pytest.mark.slow
def test_a_small_language_model_learns_from_the_tower_with_its_head_and_without(
    demo_tower: Path,
) -> None:
    known = benchmark.Questions.draw("train", 64, seed=0)
    asked = benchmark.Questions.draw("test", 32, seed=0)
    rows = list(benchmark.compare(demo_tower, known, asked, steps=8, seeds=1))
    assert [name for name, _, _ in rows] == ["with the trained head", "encoder alone"]
    for _, (losses,), (right,) in rows:
        assert max(losses[-2:]) < min(losses[:2])
        assert 0 <= right <= 1
    assert 1 / 32 <= benchmark.without_looking(known, asked) < 0.4


def test_weights_of_an_unknown_licence_are_not_put_into_a_tower(run: Path, tmp_path: Path) -> None:
    message = the_error_of(sail("export", run, "--to", "llava", "--out", tmp_path / "o", expect=1))
    assert re.search(r"licence is not known\. .* was expected\. Use --with-encoders", message)
