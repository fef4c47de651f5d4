"""Stage one on a CUDA device gives the features of the CPU, and waits for nothing on the way."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALSO = """
[encoders.image.vit.also]
vit-mean = { pooling = "mean" }
vit-first = { pooling = "cls", layer = 0 }
"""


def extracted(run_file: Path, device: str, precision: str, *overrides: str) -> FeatureStore:
    settings = [
        f"run.dir='{run_file.parent / f'{device}-{precision}-{len(overrides)}'}'",
        f"run.device='{device}'",
        f"encoders.image.vit.precision='{precision}'",
        *overrides,
    ]
    return FeatureStore.open(extract(load_config(str(run_file), settings), StopRequest())[0])


def assert_same(found: FeatureStore, expected: FeatureStore, *, atol: float) -> None:
    for name in ("vit", "vit-mean", "vit-first"):
        columns = [store.column(f"image/{name}") for store in (found, expected)]
        assert columns[0].status().tolist() == columns[1].status().tolist()
        features, reference = (column.read(0, 40).astype(np.float32) for column in columns)
        np.testing.assert_allclose(features, reference, atol=atol)


def test_all_columns_are_those_of_the_cpu(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, extra=[ALSO])
    cpu = extracted(run_file, "cpu", "float32")
    assert_same(extracted(run_file, "cuda", "float32"), cpu, atol=5e-3)
    assert_same(extracted(run_file, "cuda", "bfloat16"), cpu, atol=5e-2)


def test_a_batch_is_handed_over_without_waiting_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises where the host waits; what `_to_host` does at the end waits for an event."""
    from features import extract as feeding

    start = feeding.Feeder.start

    def watched(self, *arguments):  # type: ignore[no-untyped-def]
        torch.cuda.set_sync_debug_mode("error")
        try:
            return start(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(feeding.Feeder, "start", watched)
    run_file = tiny.world(tmp_path, extra=[ALSO])
    extracted(run_file, "cuda", "bfloat16")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_benchmark_of_extraction_runs_compiled_too(tmp_path: Path) -> None:
    from tests.benchmarks import extraction

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = extraction.random_dinov2(tmp_path / "dino", **size)
    task = extraction.Task(tmp_path, model, torch.device("cuda"), 64, distinct=32, batch_size=16)
    assert task.bare(task.encoder("exact", compile=True))() > 0
