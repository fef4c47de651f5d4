"""Text models by their name alone, or when told, as transformers gives each text by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from features.errors import EncoderError
from tests.conformance.sentences import TOLERANCE, loaded, unit
from tests.conformance.text_models import TEXT_MODELS, TextModel
from tests.text_models import sequences

TEXTS = ["a red Circle", "The Green star", "a", "ab " * 8, "x1: y, z", "left of it\nbelow"]
FAST = ("auto_map_gte_qwen2", "clip", "siglip", "t5_whole", "gpt2_last", "middle_layer")


def reference(folder: Path, model: TextModel) -> torch.Tensor:
    """Run transformers on one text after the other, without padding unless it was trained so."""
    own = getattr(transformers, model.reference or model.kind)
    config = own.config_class.from_pretrained(folder)
    width = model.config.get("projection_dim")
    if width is not None and "text_config" in model.config:
        config.projection_dim = width
    model_run = own.from_pretrained(folder, config=config).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = []
    for text in TEXTS:
        ids = tokenizer.encode(text.lower() if model.lower else text).ids
        ids += [0] * (model.padded - len(ids))
        with torch.inference_mode():
            rows.append(model.pooled(model_run(torch.tensor([ids]), **model.options)))
    return torch.cat(rows)


def check(folder: Path, name: str) -> None:
    model = TEXT_MODELS[name]
    model.write(folder)
    encoder = loaded(folder, **model.use)
    expected = unit(reference(folder, model))
    np.testing.assert_allclose(unit(encoder.encode(TEXTS)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAST)
def test_a_text_model_is_what_transformers_gives(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TEXT_MODELS.keys() - set(FAST)))
def test_every_text_model_is_what_transformers_gives(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


def test_the_matrix_is_as_large_as_the_documentation_says() -> None:
    from tests.conformance.image_models import IMAGE_MODELS

    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    assert f"{len(TEXT_MODELS)} text models" in page
    assert f"{len(IMAGE_MODELS)} image models" in page


@pytest.mark.parametrize("name", ["squeezebert", "xlnet"])
def test_an_attention_that_the_class_does_not_do_is_refused(tmp_path: Path, name: str) -> None:
    model = TEXT_MODELS[name]
    model.write(tmp_path)
    with pytest.raises(EncoderError, match=r"attention is to be causal .* computes bidirectional"):
        loaded(tmp_path, pooling="mean", attention="causal")


def test_the_space_of_a_clip_is_that_of_its_own_features(tmp_path: Path) -> None:
    """Both towers by name alone are what `get_text_features` gives."""
    folder = TEXT_MODELS["clip"].write(tmp_path)
    ids = [[1, *each, 2] for each in sequences(4, longest=20)]
    whole = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [whole.get_text_features(torch.tensor([each])) for each in ids]
    right = torch.cat([getattr(row, "pooler_output", row) for row in rows])
    found = loaded(folder).encode_tokens(ids)
    np.testing.assert_allclose(unit(found), unit(right), atol=TOLERANCE, rtol=0)
