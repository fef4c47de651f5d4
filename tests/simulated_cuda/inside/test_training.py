"""A training on a GPU: where its host waits, and that it comes to what a processor comes to."""

from pathlib import Path
from typing import Any

import pytest
import torch

from align import heldout, optimizer
from align.checkpoint import Checkpoint
from align.config import AlignConfig
from align.trainer import train
from features.store import FeatureStore
from tests.feature_stores import IMAGE, TEXT, make_store
from tests.simulated_cuda import gpu, streams

STEPS = 6
IN_A_STEP = (
    *("align/trainer.py:_log_update", "align/heads.py:AlignmentModel.scale_and_bias"),
    *("align/loader.py", "align/windows.py", "align/chunk_reader.py", "align/loss.py"),
    *("align/heads.py:AlignmentModel.embed", "align/heads.py:AlignmentModel.clamp"),
    *("align/optimizer.py:Gradients.", "align/optimizer.py:Lion", "align/trainer.py:_run_steps"),
    "align/trainer.py:Training._update",
    "align/trainer.py:Training.update",
)
"""What runs for every step, and so must not let the host wait for the device."""
WAITING = {"align/optimizer.py:Gradients.__init__"}


def settings(**changes: Any) -> AlignConfig:
    given = {"batch_size": 24, "steps": STEPS, "holdout": 0.2, "head": {"dim": 8, "depth": 2}}
    return AlignConfig.model_validate(given | {"eval_every": 3, "precision": "float32"} | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr")


def trained(store: FeatureStore, folder: Path, device: str, config: AlignConfig) -> dict[str, Any]:
    best = train(
        [store],
        config,
        image=IMAGE,
        text=TEXT,
        run_dir=folder,
        device=torch.device(device),
        seed=0,
    )
    assert best is not None
    return Checkpoint.open(folder / "last").tensors("model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 7, "ema": 0.9, "loss": {"positives": "identical"}},
        {"head": {"kind": "star", "dim": 8}, "optimizer": {"kind": "lion"}},
    ],
)
def test_a_training_on_the_second_gpu_is_that_of_a_processor(
    store: FeatureStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(**changes)
    expected = trained(store, tmp_path / "cpu", "cpu", config)
    gpu.seen.clear()
    found = trained(store, tmp_path / "gpu", "cuda:1", config)
    assert list(gpu.seen.races.values()) == []
    assert streams.contexts == {1}
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    waits = {place for what, thread, place in gpu.seen.waits if thread == "MainThread"}
    assert {place for place in waits if place.startswith(IN_A_STEP)} <= WAITING
    reads = gpu.seen.waits["_local_scalar_dense", "MainThread", "align/trainer.py:Training.numbers"]
    copies = gpu.seen.waits["a copy that blocks", "MainThread", "align/trainer.py:Training.numbers"]
    assert reads + copies == STEPS  # each step is logged
    pageable = {place for place in gpu.seen.pageable if place.startswith(IN_A_STEP)}
    assert pageable <= WAITING


def test_only_the_loss_is_computed_in_tf32(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosines of held-out rows that differ by 1e-6 are not equal; TF32 is coarser."""
    seen: dict[str, set[str]] = {}

    def noting(module: Any, name: str) -> None:
        function = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    noting(optimizer, "contrastive_loss")
    noting(heldout, "retrieval_ranks")
    trained(store, tmp_path, "cuda:0", settings(precision="auto"))
    assert seen == {"contrastive_loss": {"high"}, "retrieval_ranks": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"
