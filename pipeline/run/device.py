"""On what a run computes."""

import torch

from features.device.cuda import set_current
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
    if settings.device == "auto":
        return torch.device("cuda" if "cuda" in here else "cpu")
    if settings.device not in here:
        raise ConfigError(
            f"run.device = {settings.device} is no device that torch can use here. Set it to one "
            f"of {', '.join(here)}, or auto; or install a driver and a build of torch that has it."
        )
    device = torch.device(settings.device)
    set_current(device)  # for whatever names no device, and so takes the current one
    return device


def usable_devices() -> list[str]:
    """Return the devices of this machine that torch can use, as `run.device` names them."""
    names = ["cpu"]
    if torch.backends.mps.is_available():
        names.append("mps")
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return names
