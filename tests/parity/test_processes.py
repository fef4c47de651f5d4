"""A head trained by several processes is that of one process at the same batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.checkpoint import Checkpoint
from align.config import AlignConfig
from align.processes import Ring
from align.trainer import train
from features.errors import TrainingError
from features.store import FeatureStore
from tests.feature_stores import IMAGE, TEXT, make_store
from tests.processes import run_processes
from tests.trainings import spoil

pytestmark = pytest.mark.slow  # starts processes that import torch
MODULE = "tests.parity.test_processes"
TOLERANCE = 1e-4  # of the weights after 12 updates; their own change is above 1e-2
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "infonce": {"loss": {"kind": "infonce"}},
    "identical": {"loss": {"positives": "identical", "field_weights": {"bare": 0.5}}},
    "closed form": {"start": "cca"},
    "drawn": {"captions_per_image": 1, "micro_batch": 3, "optimizer": {"max_grad_norm": 0.5}},
}


def config(name: str) -> AlignConfig:
    given = {
        "batch_size": 32,
        "steps": 12,
        "eval_every": 4,
        "checkpoint_every": 2,
        "holdout": 0.2,
        "memory_mb": 1,
        "start": "random",
        "head": {"dim": 8, "depth": 2},
        "optimizer": {"epsilon": 1e-4},  # rounding is not made larger where gradients are about 0
    }
    merged = given | SETTINGS[name]
    merged["optimizer"] = given["optimizer"] | SETTINGS[name].get("optimizer", {})
    return AlignConfig.model_validate(merged)


def train_one(store: str, run_dir: str, name: str, stop_after: str = "") -> None:
    """Train, alone or as one of several processes; asked to stop at a step on the last of them."""
    steps, ring = list[int](), Ring.of_processes()

    def should_stop() -> bool:
        steps.append(1)
        return ring.rank == ring.size - 1 and len(steps) == int(stop_after or 1000)

    best = train(
        [FeatureStore.open(Path(store))],
        config(name),
        image=IMAGE,
        text=TEXT,
        run_dir=Path(run_dir),
        device=torch.device("cpu"),
        seed=0,
        should_stop=should_stop,
    )
    assert (best is None) == bool(stop_after)


def train_all(store: str, folder: str) -> None:
    """Train with each of the settings."""
    for name in SETTINGS:
        train_one(store, f"{folder}/{name}", name)


def start(size: int, store: Path, run_dir: Path, name: str, stop_after: str = "") -> None:
    arguments = [str(store), str(run_dir), name, stop_after]
    run_processes(size, MODULE, "train_one", *arguments)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "s.zarr"
    captions = {
        "bare": [f"kind {row % 20}" for row in range(200)],
        "long": [f"picture {row}" for row in range(200)],
    }
    make_store(path, bad_images=(2,), bad_captions=((5, 0), (6, 1)), captions=captions)
    return path


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} processes")
def trained(
    request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("many")
    run_processes(request.param, MODULE, "train_all", str(store), str(folder))
    return folder


def assert_same(found: Path, expected: Path) -> None:
    for kind in ("last", "best"):
        assert Checkpoint.open(found / kind).step == Checkpoint.open(expected / kind).step
        weights = load_file(expected / kind / "model.safetensors")
        for name, tensor in load_file(found / kind / "model.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=TOLERANCE, atol=TOLERANCE)


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_train_the_head_of_one_process(
    trained: Path, store: Path, tmp_path: Path, name: str
) -> None:
    train_one(str(store), str(tmp_path / "one"), name)
    assert_same(trained / name, tmp_path / "one")
    rounding = 1e-4 if name == "closed form" else 1e-5  # of sums that are inverted
    assert losses(trained / name) == pytest.approx(losses(tmp_path / "one"), rel=rounding)


def test_a_training_goes_on_with_another_number_of_processes(store: Path, tmp_path: Path) -> None:
    start(2, store, tmp_path / "many", "sigmoid", stop_after="3")
    assert Checkpoint.open(tmp_path / "many" / "last").step == 3
    train_one(str(store), str(tmp_path / "many"), "sigmoid", stop_after="4")
    assert Checkpoint.open(tmp_path / "many" / "last").step == 7
    start(4, store, tmp_path / "many", "sigmoid")
    train_one(str(store), str(tmp_path / "one"), "sigmoid")
    assert_same(tmp_path / "many", tmp_path / "one")


def fail_with_a_number_that_is_none(store: str, run_dir: str) -> None:
    """Every process must end with the same error, whichever had the row."""
    with pytest.raises(TrainingError, match=r"not finite at step 5.*step-00000004"):
        train_one(store, run_dir, "sigmoid")


def test_a_loss_that_is_not_finite_stops_every_process(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    spoil(store, config("sigmoid"), 4)
    arguments = [str(store.path), str(tmp_path / "run")]
    run_processes(2, MODULE, "fail_with_a_number_that_is_none", *arguments)
    assert Checkpoint.open(tmp_path / "run" / "last").step == 4
