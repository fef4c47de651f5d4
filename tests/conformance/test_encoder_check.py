"""`sail encoders NAME --check` compares with the reference client, and can find a difference."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import sail, the_error_of
from tests.conformance.image_models import IMAGE_MODELS
from tests.conformance.sentences import sentence_folder
from tests.conformance.text_models import TEXT_MODELS


def checked(model: Path | str, *options: str, expect: int = 0) -> list[dict[str, Any]]:
    result = sail("encoders", model, "--check", "--json", *options, expect=expect)
    plans: list[dict[str, Any]] = json.loads(result.stdout)
    return plans


@pytest.mark.slow
def test_a_folder_of_sentence_transformers_is_compared_with_that_library(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "st", "cls")
    (plan,) = checked(folder)
    assert plan["check"]["equal"] is True
    assert plan["check"]["reference"].startswith("sentence_transformers ")
    assert plan["check"]["inputs"] == 20
    assert 0 <= plan["check"]["largest_difference"] <= 2e-6
    (plan,) = checked(folder, "--set", "pooling=max", expect=1)  # otherwise than its files say
    assert plan["check"]["largest_difference"] > 0.01
    shown = sail("encoders", folder, "--check", "--set", "pooling=max", expect=1).stdout
    assert "DIFFERS from sentence_transformers" in shown
    message = the_error_of(sail("encoders", folder, "--check", "--set", "dim=5", expect=1))
    assert "gives 5 numbers for one input" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "dinov2_with_registers", "clip"])
def test_an_image_model_is_compared_with_transformers(tmp_path: Path, name: str) -> None:
    folder = IMAGE_MODELS[name].write(tmp_path)
    plans = checked(folder, "--set", "batch_size=2")
    assert [each["kind"] for each in plans] == ["image"]
    assert plans[0]["check"]["equal"] is True
    assert plans[0]["check"]["reference"].startswith("transformers ")


@pytest.mark.parametrize("name", ["gpt2_last", "clip"])
def test_a_text_model_is_compared_with_transformers(tmp_path: Path, name: str) -> None:
    model = TEXT_MODELS[name]
    folder = model.write(tmp_path)
    settings = [f"--set={key}={json.dumps(value)}" for key, value in model.use.items()]
    plans = checked(folder, "--set", "tokens_per_batch=300", *settings)
    assert plans[0]["check"]["equal"] is True


def test_what_has_no_reference_client_is_one_line() -> None:
    message = the_error_of(sail("encoders", "baseline:pixels", "--check", expect=1))
    assert "There is no reference client for baseline:pixels" in message
