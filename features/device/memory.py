"""A device that is out of memory, whichever library says so and in whichever stage."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from features.device.cuda import is_gpu
from features.errors import SailError

GIB = 1 << 30


@contextmanager
def one_memory_error() -> Iterator[None]:
    """Raise torch.OutOfMemoryError, too, where CUDA itself or FAISS has found no memory.

    Pinned memory and contexts of CUDA are no affair of torch's allocator, nor is FAISS: these raise
    other errors, of which all are RuntimeErrors.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and re.search(
            "out of memory|cudaMalloc", str(error)
        ):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


@contextmanager
def refusing_without_memory(
    kind: type[SailError], what: str, device: torch.device, way_out: str
) -> Iterator[None]:
    """Say in one line that a device is out of memory.

    Args:
        kind: The error that is raised.
        what: What needed the memory, as the beginning of a sentence.
        device: Where.
        way_out: The settings that help, as a sentence.
    """
    try:
        with one_memory_error():
            yield
    except torch.OutOfMemoryError as error:
        raise kind(f"{what} ran out of memory on {device}{memory_of(device)}. {way_out}") from error


def memory_of(device: torch.device) -> str:
    """Say how much memory a GPU has, as the end of a sentence; nothing of other devices."""
    if not is_gpu(device):
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f", which has {total / GIB:.1f} GiB ({free / GIB:.1f} free now)"
