"""What a GPU asks for beside what a processor does: events, pinned copies, the current device.

CUDA takes the current device of the calling thread wherever none is named, which in a new thread is
the first of the machine, whatever the tensors are on. So streams and events are named here alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def is_gpu(device: torch.device) -> bool:
    """Whether a device is one of CUDA, where copies and kernels go on while the host does."""
    return device.type == "cuda"


def first_gpu() -> torch.device | None:
    """Return the first GPU that CUDA has here, None if there is none."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def gpu_number(number: int) -> torch.device:
    """Return the device of a GPU, by its number among those that this process sees."""
    return torch.device("cuda", number)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has bfloat16, as from Ampere on; those before emulate it, slowly."""
    return is_gpu(device) and torch.cuda.get_device_capability(device) >= (8, 0)


def half_type(device: torch.device) -> torch.dtype:
    """Return the fast type of a GPU in which frozen encoders run; float32 elsewhere."""
    if not is_gpu(device):
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


_chosen: list[torch.device] = []


def choose(device: torch.device) -> None:
    """Make a device that of this process: searches of rows take it, and whatever names none."""
    set_current(device)
    _chosen[:] = [device]


def chosen() -> torch.device | None:
    """Return the device of this process, None if none was chosen."""
    return _chosen[0] if _chosen else None


def set_current(device: torch.device) -> None:
    """Make a GPU the current device of this thread; without effect for other devices."""
    if is_gpu(device) and device.index is not None:
        torch.cuda.set_device(device)


def record(device: torch.device) -> torch.cuda.Event:
    """Return an event after all that this thread has launched on a GPU."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(event: torch.cuda.Event, device: torch.device) -> None:
    """Let what this thread launches on a GPU from now on come after an event; the host goes on."""
    torch.cuda.current_stream(device).wait_event(event)


def room_for(device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory of the host, from and to which the device copies by itself."""
    if not is_gpu(device):
        return torch.empty(shape, dtype=dtype)
    with torch.cuda.device(device):
        return torch.empty(shape, dtype=dtype, pin_memory=True)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; a GPU is not waited for, since it reads a pinned copy.

    The allocator of pinned memory gives that memory to nobody before it was read.
    """
    if not is_gpu(device) or values.is_cuda:
        return values.to(device)
    with torch.cuda.device(device):
        return values.pin_memory().to(device, non_blocking=True)
