"""On what a run computes: the devices of this machine, and those that it does not have."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluate.nearest import flat_search
from features.device.cuda import choose
from features.errors import ConfigError
from pipeline.run.config import RunSettings
from pipeline.run.device import prepare_device, usable_devices


@pytest.mark.parametrize("device", usable_devices())
def test_a_device_that_is_here_can_be_computed_on(device: str) -> None:
    chosen = prepare_device(RunSettings(device=device))
    assert torch.ones(2, device=chosen).sum() == 2


def test_a_device_that_is_not_here_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"run\.device = cuda:63 is no device .* one of cpu"):
        prepare_device(RunSettings(device="cuda:63"))


def test_a_gpu_is_chosen_only_where_there_is_one() -> None:
    chosen = prepare_device(RunSettings(device="auto"))
    assert (chosen.type == "cuda") == torch.cuda.is_available()


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cuda", 0), ("cpu", None)])
def test_rows_are_searched_on_the_device_of_the_run(
    monkeypatch: pytest.MonkeyPatch, device: str, number: int | None
) -> None:
    """FAISS with a GPU is in no environment of the tests: this is what it is asked for."""
    asked = []

    def search(*_: object, device: int | None = None, **__: object) -> tuple[np.ndarray, ...]:
        asked.append(device)
        return np.zeros((2, 1), dtype=np.float32), np.zeros((2, 1), dtype=np.int64)

    faiss = SimpleNamespace(
        __version__="1",
        METRIC_INNER_PRODUCT=0,
        StandardGpuResources=lambda: None,
        get_num_gpus=lambda: 2,
        knn_gpu=search,
        knn=search,
    )
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    choose(torch.device(device))
    rows = np.zeros((2, 2), dtype=np.float32)
    flat_search().search(rows, rows, 1)
    assert asked == [number]
    assert flat_search().name.endswith("on the GPU") == (number is not None)
