"""What is chosen by the GPUs of a machine: the type of computing, and which GPU is whose."""

import pytest
import torch

from align.config import AlignConfig
from align.optimizer import autocast_type
from features.encoders.checkpoint import compute_dtype
from features.errors import ConfigError
from pipeline.planning.doctor import examine
from pipeline.run.config import RunSettings
from pipeline.run.device import gpu_of_process, prepare_device
from tests.simulated_cuda import gpu, streams

FIRST = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("capability", "encoders", "heads"),
    [
        ((7, 5), torch.float16, None),
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((10, 0), torch.bfloat16, torch.bfloat16),
    ],
)
def test_bfloat16_that_is_emulated_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    encoders: torch.dtype,
    heads: torch.dtype | None,
) -> None:
    monkeypatch.setattr(gpu, "CAPABILITY", capability)
    assert torch.cuda.is_bf16_supported()  # as torch says of every GPU
    assert compute_dtype("auto", FIRST) == encoders
    assert autocast_type(AlignConfig(), FIRST) == heads
    assert autocast_type(AlignConfig(precision="bfloat16"), FIRST) == torch.bfloat16


@pytest.mark.slow
def test_the_doctor_says_of_each_gpu_what_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CAPABILITY", (7, 5))
    checks = {check["name"]: check["found"] for check in examine(None)["checks"]}
    for name in ("cuda:0", "cuda:1"):
        assert "float16, no bfloat16" in checks[name]


def test_the_gpu_that_is_named_becomes_the_current_one() -> None:
    assert prepare_device(RunSettings(device="cuda:1")) == torch.device("cuda:1")
    assert torch.cuda.current_device() == 1
    streams.set_device(0)


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    every = [gpu_of_process(RunSettings(device="cuda"), number) for number in (0, 1)]
    assert every == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(ConfigError, match=r"Process 2 .* no GPU: there are 2.*per-node=2"):
        gpu_of_process(RunSettings(), 2)
    with pytest.raises(ConfigError, match=r"run\.device = cuda:1 names one GPU"):
        gpu_of_process(RunSettings(device="cuda:1"), 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"Process 1 .* there are 1"):
        gpu_of_process(RunSettings(), 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # each process sees its own alone
    assert gpu_of_process(RunSettings(), 1) == torch.device("cuda:0")
