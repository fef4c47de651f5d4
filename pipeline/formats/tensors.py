"""Safetensors files: tensors by name."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pipeline.formats.arrays import unreadable
from pipeline.formats.rows import Layout


class SafetensorsArrays(AbstractContextManager["SafetensorsArrays"]):
    """The tensors of a file. bfloat16 comes as float32, which has room for all of it."""

    layout: Layout | None = None
    usual: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            SourceError: It is none.
        """
        self.files = (path,)
        try:
            self._file = cast(Any, safe_open)(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error, "A safetensors file") from error
        self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - it is no dictionary
        self.shapes = {name: tuple(part.get_shape()) for name, part in self._slices.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of a tensor."""
        rows: torch.Tensor = self._slices[name][start:stop]
        return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
