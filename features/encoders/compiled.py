"""The forward pass of an image encoder, compiled by torch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from features.config import ImageColumnConfig
from features.errors import EncoderError

Forward = Callable[[Tensor, Sequence[ImageColumnConfig]], list[Tensor]]


class CompiledForward:
    """A forward pass that is compiled once for each choice of columns and size of batch."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._compiled: dict[tuple[ImageColumnConfig, ...], Callable[[Tensor], list[Tensor]]] = {}

    def __call__(self, pixels: Tensor, wanted: Sequence[ImageColumnConfig]) -> list[Tensor]:
        """Return the features of each column."""
        columns = tuple(wanted)
        if columns not in self._compiled:
            self._compiled[columns] = torch.compile(
                lambda pixels: self._forward(pixels, columns), dynamic=False
            )
        return self._compiled[columns](pixels)


def check_compiles(name: str, encode: Callable[[], object]) -> None:
    """Encode once, which compiles.

    Raises:
        EncoderError: It cannot be compiled; most often there is no compiler.
    """
    try:
        encode()
    except torch.OutOfMemoryError:
        return  # not for the compiler to say: the batch is halved when images come
    except RuntimeError as error:
        raise EncoderError(
            f"The image encoder {name!r} cannot be compiled: {str(error).splitlines()[0]} A C++ "
            f"compiler (on a GPU also triton) was expected. Install one, or leave out "
            f"`compile = true`."
        ) from error
