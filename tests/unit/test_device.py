"""On what a run computes: the devices of this machine, and those that it does not have."""

import pytest
import torch

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
