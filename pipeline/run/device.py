"""On what a run computes."""

import os

import torch

from features.device.cuda import choose, gpu_number
from features.errors import ConfigError
from pipeline.run.config import RunSettings

ANY_GPU = ("auto", "cuda")
"""Settings of `run.device` that leave open which of several GPUs it is."""


def prepare_device(settings: RunSettings) -> torch.device:
    """Set the processor threads of torch, and return the device of the setting `run.device`.

    Raises:
        ConfigError: Torch cannot use that device here.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    here = usable_devices()
    device = settings.device
    if device == "auto":
        device = "cuda" if "cuda" in here else "cpu"
    if device not in here:
        raise ConfigError(
            f"run.device = {settings.device} is no device that torch can use here. Set it to one "
            f"of {', '.join(here)}, or auto; or install a driver and a build of torch that has it."
        )
    choose(torch.device(device))
    return torch.device(device)


def gpu_of_process(settings: RunSettings, number: int) -> torch.device:
    """Return the GPU of a process of torchrun, by its number among those of this machine.

    Raises:
        ConfigError: One GPU is named for all of them, or there are more processes than GPUs.
    """
    if settings.device not in ANY_GPU:
        raise ConfigError(
            f"run.device = {settings.device} names one GPU, but each process of torchrun takes its "
            f"own. Set it to cuda or auto, and CUDA_VISIBLE_DEVICES where some are to be left out."
        )
    here = torch.cuda.device_count()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if here == 1 and shown is not None:  # as under Slurm, which shows each process its own
        number = 0
    if number >= here:
        raise ConfigError(
            f"Process {number} of this machine has no GPU: there are {here}. As many processes as "
            f"GPUs were expected. Start torchrun with --nproc-per-node={here}."
        )
    return gpu_number(number)


def usable_devices() -> list[str]:
    """Return the devices of this machine that torch can use, as `run.device` names them."""
    names = ["cpu"]
    if torch.backends.mps.is_available():
        names.append("mps")
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return names
