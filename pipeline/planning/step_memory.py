"""The memory that a training step takes on a GPU, counted without a GPU and without that memory.

The step itself runs on tensors that have shapes and no values, and every tensor is counted as it is
made and dropped. What a real allocator leaves unused is not in it, nor is the context of CUDA.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.config import AlignConfig
from align.heads import build_model
from align.loader import MIB, Batch
from align.optimizer import GPU_BLOCK_ROWS, Gradients, build_optimizer

CONTEXT_BYTES = 512 * MIB
"""What CUDA itself takes of a GPU, about."""
USABLE = 0.9
"""Share of a GPU's memory that a step can have: an allocator leaves some unused. Assumed."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device that trains, beside the features of `align.memory_mb`."""

    kept: int
    """Between steps: the weights, the optimizer's state, the gradients and a batch."""
    peak: int
    """The most during a step, with what is kept."""


def step_memory(
    config: AlignConfig, *, image_dim: int, text_dim: int, captions: int, rows_at_once: int
) -> StepMemory:
    """Count the memory of one training step.

    Args:
        config: With a batch size, and a precision that says the type of the products.
        image_dim: Length of an image's features.
        text_dim: Length of a caption's.
        captions: Of an image, in a batch.
        rows_at_once: Images that the heads hold at once, as `align.micro_batch`.
    """
    loss = config.loss.model_copy(
        update={"block_rows": config.loss.block_rows or GPU_BLOCK_ROWS, "field_weights": {}}
    )
    config = config.model_copy(update={"loss": loss, "micro_batch": rows_at_once})
    device, rows = torch.device("cpu"), config.batch_size
    with FakeTensorMode(), _Counting() as counted:
        model = build_model(
            dict(config.head),
            image_dim=image_dim,
            text_dim=text_dim,
            initial_scale=loss.initial_scale,
            initial_bias=loss.initial_bias,
        )
        optimizer = build_optimizer(model, config.optimizer)
        fields = [str(number) for number in range(captions)]
        gradients = Gradients(model, config, fields, seed=0, device=device)
        batch = Batch(
            rows=np.arange(rows),
            image=torch.empty(rows, image_dim, dtype=torch.float16),
            text=torch.empty(rows, captions, text_dim, dtype=torch.float16),
            fields=torch.zeros(rows, captions, dtype=torch.int64),
            caption_ids=None,
        )
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # makes its state
        kept, counted.peak = counted.held, counted.held
        gradients.backward(batch, 0)
        optimizer.step()
    return StepMemory(kept, counted.peak)


def sizes_at_once(config: AlignConfig) -> Iterator[int]:
    """Yield what `align.micro_batch` can be: the number given, or all rows, a half and so on."""
    if config.micro_batch != "auto":
        yield min(config.micro_batch, config.batch_size)
        return
    size = config.batch_size
    while size > 1:
        yield size
        size = -(-size // 2)
    yield 1


def room_of_step(config: AlignConfig, memory: int) -> int:
    """Return the bytes that a step can have on a GPU of so many bytes."""
    return int(USABLE * (memory - CONTEXT_BYTES - config.memory_mb * MIB))


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that there are, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.held -= size
