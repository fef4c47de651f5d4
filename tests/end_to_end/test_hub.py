"""Heads and exported folders are taken from the Hugging Face hub by their address."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from features.errors import ConfigError
from pipeline.export.exports import export_run
from pipeline.hub import fetched
from pipeline.python import load_aligned
from tests.commands import sail, the_error_of
from tests.servers import HubServer
from tests.trained import trained

TEXTS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    run = trained(folder / "world")
    return export_run(run, "hf", folder / "exported", with_encoders=True)


@pytest.fixture(autouse=True)
def _hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer(exported, "org/aligned", kind="models") as server:
        server.reach(monkeypatch)
        yield


def test_an_exported_folder_on_the_hub_embeds_as_the_one_on_disk(exported: Path) -> None:
    there = load_aligned("hf://org/aligned", device="cpu").encode_text(TEXTS)
    here = load_aligned(exported, device="cpu").encode_text(TEXTS)
    np.testing.assert_array_equal(there, here)


def test_a_file_on_the_hub_is_fetched(exported: Path) -> None:
    found = fetched("hf://org/aligned@main/model.safetensors")
    assert found.read_bytes() == (exported / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://org/none", "cannot be fetched"),
        ("hf://org/aligned/head.pt", "cannot be fetched"),
        ("hf://org/aligned@v9", "cannot be fetched"),
        ("hf://aligned", "is no address of the hub"),
    ],
)
def test_what_the_hub_has_not_is_one_line(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fetched(address)


def test_a_head_that_the_hub_has_not_is_not_imported(tmp_path: Path) -> None:
    run = ("sail-paper", "--set", f"run.dir='{tmp_path / 'run'}'")
    error = the_error_of(sail("import-head", "hf://org/aligned/head.pt", *run, expect=1))
    assert "hf://org/aligned/head.pt cannot be fetched" in error
