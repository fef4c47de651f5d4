"""The heads as ONNX give what torch gives, run by onnxruntime."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from features.errors import CheckpointError
from pipeline.export import onnx
from pipeline.export.exports import export_run
from pipeline.python import load_aligned
from tests import tiny
from tests.commands import sail, the_error_of
from tests.trained import trained

onnxruntime: Any = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("glu"), "align.head.depth=8")


@torch.no_grad()
def check_equal(run: Path, out: Path) -> None:
    model = load_aligned(run, device="cpu").model
    for name, head, dim in [
        ("image", model.image_head, 16),
        ("text", model.text_head, 12),
    ]:
        session = onnxruntime.InferenceSession(out / f"{name}_head.onnx")
        for rows in (1, 5):
            features = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows))
            (found,) = session.run(None, {"features": features.numpy()})
            expected = F.normalize(head(features), dim=-1).numpy()
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_eight_gated_layers_are_the_same_in_onnxruntime_and_the_card_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert sail("export", run, "--to", "onnx", "--out", out).stdout == f"{out}\n"
    check_equal(run, out)
    card = (out / "README.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"differs from torch by at most (\S+) in", card)
    assert 0 <= float(told) <= 1e-5
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"].shape == (2, 5)
    export_run(run, "hf", out)  # takes the place of an earlier export
    assert not (out / "image_head.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.TRAINED_HEADS)
def test_every_kind_of_head_is_the_same_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "world", f"align.head.kind={kind}", "align.epochs=1")
    check_equal(run, export_run(run, "onnx", tmp_path / "out"))


def test_a_head_that_onnxruntime_computes_otherwise_is_not_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(CheckpointError, match=r"off by .* was expected\. Use the versions"):
        export_run(run, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda _: None)  # type: ignore[attr-defined]
    message = the_error_of(sail("export", run, "--to", "onnx", "--out", tmp_path / "o", expect=1))
    assert re.search(r"are not installed\. The extra `onnx` was expected\. Use pip", message)
