"""The tensors of a safetensors file."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pipeline.stores.arrays import Arrays, unreadable


class SafetensorsArrays(Arrays):
    """The tensors of a file. bfloat16 comes as float32, which has room for all of it."""

    def _open(self, path: Path, stack: ExitStack) -> None:
        self.files = (path,)
        try:
            file = stack.enter_context(cast(Any, safe_open)(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error, "A safetensors file") from error
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            tensor = file.get_slice(name)
            self._add(name, tuple(tensor.get_shape()), partial(_rows, tensor))


def _rows(tensor: Any, start: int, stop: int) -> np.ndarray:
    rows: torch.Tensor = tensor[start:stop]
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()


read = SafetensorsArrays
