"""Several processes that train one head together, as torchrun starts them."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from align.ring import Ring
from pipeline.config import RunSettings
from pipeline.device import prepare_device


@contextmanager
def joined_processes(settings: RunSettings) -> Iterator[tuple[Ring, torch.device]]:
    """Join the processes of torchrun, if it started this one; give the ring and our device.

    On GPUs each process has its own, the one of its number on this machine. What the processes
    tell one another beside tensors of a GPU goes over gloo, so that no GPU is waited for.
    """
    device = prepare_device(settings)
    if not dist.is_torchelastic_launched():
        yield Ring(), device
        return
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        ring = Ring.of_processes()
        if not ring.leads:  # the first one speaks for all
            logging.disable(logging.INFO)
        yield ring, device
    finally:
        dist.destroy_process_group()
