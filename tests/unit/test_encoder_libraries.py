"""Encoders of libraries that are extras: what is said where these are not installed."""

import json
import sys
from pathlib import Path

import pytest

from features.config import ImageEncoderConfig
from features.encoders.backends import backend_of
from tests.commands import sail, the_error_of


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("timm", "open_clip"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("timm", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("model", "extra"), [("timm:resnet18", "timm"), ("open_clip:ViT-B-32/openai", "open_clip")]
)
def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, model: str, extra: str) -> None:
    absent(monkeypatch)
    message = the_error_of(sail("encoders", model, expect=1))
    assert f"{extra} is not installed" in message
    assert f"`pip install -e '.[{extra}]'`" in message


def test_a_folder_of_timm_needs_no_prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent(monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    message = the_error_of(sail("encoders", tmp_path, expect=1))
    assert "The model is one of timm" in message
    (tmp_path / "open_clip_config.json").write_text("{}")
    message = the_error_of(sail("encoders", tmp_path, expect=1))
    assert f"Write model = 'timm:{tmp_path} or open_clip:{tmp_path}'" in message


def test_a_library_that_cannot_be_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As timm beside a torchvision that was built for another torch."""
    absent(monkeypatch)
    monkeypatch.delitem(sys.modules, "timm")
    (tmp_path / "timm.py").write_text(
        "raise RuntimeError('operator torchvision::nms is not there')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    message = the_error_of(sail("encoders", "timm:resnet18", expect=1))
    assert "installed but cannot be imported: operator torchvision::nms is not there." in message


def test_without_the_library_nothing_is_said_to_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    for model in ("timm:resnet18", "open_clip:ViT-B-32/openai"):
        backend = backend_of(model)
        assert not backend.is_here(model, None)
        can_be_fetched, words, _ = backend.missing(model)
        assert not can_be_fetched
        assert "is not installed" in words


def test_a_folder_behind_a_prefix_lies_beside_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "minilm").mkdir()
    names = ["timm:model", "timm:elsewhere", "bundled:minilm"]
    found = [
        ImageEncoderConfig.model_validate({"model": name}, context={"folder": tmp_path}).model
        for name in names
    ]
    assert found == [f"timm:{tmp_path / 'model'}", *names[1:]]
