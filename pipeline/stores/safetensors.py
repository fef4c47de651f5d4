"""The tensors of a safetensors file."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open

from features.storage.reading import check_regular
from pipeline.stores.arrays import Arrays, of_form


class SafetensorsArrays(Arrays):
    """The tensors of a file. bfloat16 and 8 bits come as float32, which has room for all of it."""

    expected = of_form("A safetensors file")

    def _open(self, path: Path, stack: ExitStack) -> None:
        self.files = (path,)
        file = stack.enter_context(cast(Any, safe_open)(check_regular(path), framework="pt"))
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            tensor = file.get_slice(name)
            self._add(name, tuple(tensor.get_shape()), partial(_rows, tensor))


def _rows(tensor: Any, start: int, stop: int) -> np.ndarray:
    rows: torch.Tensor = tensor[start:stop]
    return numpy_of(rows)


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array; floating-point types that NumPy lacks come as float32."""
    is_known = tensor.dtype in (torch.float16, torch.float32, torch.float64)
    return (tensor.float() if tensor.is_floating_point() and not is_known else tensor).numpy()


read = SafetensorsArrays
