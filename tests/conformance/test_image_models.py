"""Image models by their name alone, and by each pooling, as transformers itself gives them."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from features.config import ImageEncoderConfig
from features.encoders import ImageEncoder, load_image_encoder
from features.encoders.structure import structure_of
from features.errors import EncoderError
from tests import tiny
from tests.conformance.image_models import IMAGE_MODELS, POOLED, ImageModel
from tests.conformance.images import PICTURES, TOLERANCE, encoded, unit

FAST = ("swin", "dinov2_with_registers", "clip", "siglip", "vit_beit_processor", "pixio")


def loaded(folder: Path, **settings: Any) -> ImageEncoder:
    config = ImageEncoderConfig(model=str(folder), precision="float32", **settings)
    return load_image_encoder("x", config, torch.device("cpu"))


def reference(folder: Path, model: ImageModel, pooling: str) -> torch.Tensor:
    """What the class of transformers gives of what its own Pillow processor makes."""
    kind = model.processor["image_processor_type"]
    processor = getattr(transformers, kind + "Pil").from_pretrained(folder)
    images = [Image.open(io.BytesIO(tiny.encoded(tiny.picture(*each), "PNG"))) for each in PICTURES]
    pixels = processor([each.convert("RGB") for each in images], return_tensors="pt")
    options: dict[str, Any] = {}
    kind = model.kind
    if kind in ("CLIPModel", "MetaClip2Model", "SiglipModel"):
        projected = pooling == "projection"
        kind = kind.replace("Model", "VisionModel") + ("WithProjection" if projected else "")
    if kind == "ViTMAEModel":
        options["config"] = transformers.ViTMAEConfig.from_pretrained(folder, mask_ratio=0.0)
    own = getattr(transformers, kind).from_pretrained(folder, **options).eval()
    inputs: dict[str, Any] = {"pixel_values": pixels["pixel_values"]}
    if kind == "ViTMAEModel":
        inputs["noise"] = torch.arange(16).expand(len(images), -1)
    with torch.inference_mode():
        output = own(**inputs)
    structure = structure_of(own.config)
    prefix = (structure.prefix or 0) if structure else 0
    return POOLED[pooling](output, prefix)


def check(folder: Path, name: str) -> None:
    model = IMAGE_MODELS[name]
    model.write(folder)
    encoder = loaded(folder)
    assert encoder.columns[0].settings.pooling == model.pooling
    others = [each for each in model.also if each in POOLED]
    also = {each: {"pooling": each} for each in others}
    expected = [reference(folder, model, each) for each in (model.pooling, *others)]
    for found, right in zip(encoded(loaded(folder, also=also)), expected, strict=True):
        np.testing.assert_allclose(unit(found), unit(right), atol=TOLERANCE, rtol=0)
    for pooling in model.refused:
        words = re.escape(f"pooling '{pooling}' is not there")
        with pytest.raises(EncoderError, match=f"class token.*{words}"):
            loaded(folder, pooling=pooling)


@pytest.mark.parametrize("name", FAST)
def test_an_image_model_by_its_name_is_what_transformers_gives(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(IMAGE_MODELS.keys() - set(FAST)))
def test_every_image_model_by_its_name_is_what_transformers_gives(
    tmp_path: Path, name: str
) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, each in IMAGE_MODELS.items() if "cls" in (each.pooling, *each.also)]
)
def test_tokens_before_the_patches_are_those_that_do_not_depend_on_the_picture(
    tmp_path: Path, name: str
) -> None:
    """The table of types, held to the models."""
    model = loaded(IMAGE_MODELS[name].write(tmp_path)).model
    structure = structure_of(model.config)
    assert structure is not None
    noise = torch.randn(2, 3, 32, 32)
    options = {"noise": torch.arange(16).expand(2, -1)} if name == "vit_mae" else {}
    with torch.inference_mode():
        first = model(noise, output_hidden_states=True, **options).hidden_states[0]
    alike = (first[0] == first[1]).all(dim=1).nonzero().flatten().tolist()
    assert alike == list(range(structure.prefix or 0))


def test_settings_within_processor_config_and_without_a_type_are_read(tmp_path: Path) -> None:
    folder = IMAGE_MODELS["vit"].write(tmp_path)
    right = encoded(loaded(folder))[0]
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert torch.equal(encoded(loaded(folder))[0], right)
    del settings["image_processor_type"]
    (folder / "processor_config.json").unlink()
    path.write_text(json.dumps(settings))
    encoder = loaded(folder)
    assert torch.equal(encoded(encoder)[0], right)
    assert encoder.plan is not None
    assert encoder.plan["processor"] == "ViTImageProcessor"


def test_code_of_its_own_beside_a_known_type_is_refused(tmp_path: Path) -> None:
    folder = IMAGE_MODELS["vit"].write(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoModel": "own.Model"}}
    path.write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=r"asks for code of its own, 'own\.Model'"):
        loaded(folder)
