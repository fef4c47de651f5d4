"""On what a run computes."""

import torch

from pipeline.config import RunSettings


def prepare_device(settings: RunSettings) -> torch.device:
    """Set the processor threads of torch, and return the device of the setting `run.device`."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
