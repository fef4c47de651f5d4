"""Feeds an image encoder: batches that fit the device, and features that come back by themselves.

On a CUDA device nothing here waits for the device: the next batch is handed over while the one
before it is computed and copied back.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float16, Num
from torch import Tensor

from features.encoders.image import ImageColumn, ImageEncoder
from features.errors import EncoderError

logger = logging.getLogger(__name__)


class Feeder:
    """Hands batches to an encoder, in smaller pieces once the device has run out of memory."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self.batch_size = encoder.batch_size
        """Images that are encoded at once; never more than the encoder's own setting."""
        self.ahead = 1 if encoder.device.type == "cuda" else 0
        """Batches to have on the device before waiting for the first of them."""
        self._encoder = encoder

    def start(
        self, pixels: Num[Tensor, "batch 3 height width"], columns: Sequence[ImageColumn]
    ) -> "Encoding":
        """Begin to encode a batch.

        Raises:
            EncoderError: Not even a single image fits the memory of the device.
        """
        pieces: list[Encoding] = []
        done = 0
        while done < len(pixels):
            piece = pixels[done : done + self.batch_size]
            encoding = self._try(piece, columns)
            if encoding is None:
                self._halve(len(piece))
                continue
            pieces.append(encoding)
            done += len(piece)
        return lambda: [
            np.concatenate(parts) for parts in zip(*(wait() for wait in pieces), strict=True)
        ]

    def _try(self, pixels: Tensor, columns: Sequence[ImageColumn]) -> "Encoding | None":
        """Begin to encode some images; None if the device has not the memory."""
        try:
            return _to_host(self._encoder.encode(pixels, columns, batch_size=self.batch_size))
        except torch.OutOfMemoryError:
            return None

    def _halve(self, images: int) -> None:
        name, device = self._encoder.name, self._encoder.device
        if images == 1:
            raise EncoderError(
                f"The image encoder {name!r} runs out of memory on {device} with a single image. "
                f"Room for one was expected. Free the device, or use another (`run.device`)."
            )
        self.batch_size = images // 2
        if device.type == "cuda":
            torch.cuda.empty_cache()  # in pieces of the old size it is of no use
        logger.warning(
            "image encoder %s: out of memory on %s with %d images at once; goes on with %d",
            name,
            device,
            images,
            self.batch_size,
        )


Encoding = Callable[[], list[Float16[np.ndarray, "batch _"]]]
"""Waits for the features of a batch, one array for each column."""


def _to_host(features: Sequence[Tensor]) -> Encoding:
    """Begin to copy features to the host as float16."""
    halves = [each.half() for each in features]
    if halves[0].device.type != "cuda":
        arrays = [each.cpu().numpy() for each in halves]
        return lambda: arrays
    with torch.cuda.device(halves[0].device):
        copies = [torch.empty_like(each, device="cpu", pin_memory=True) for each in halves]
        for copy, half in zip(copies, halves, strict=True):
            copy.copy_(half, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

    def wait() -> list[np.ndarray]:
        copied.synchronize()
        return [copy.numpy() for copy in copies]

    return wait
