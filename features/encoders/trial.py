"""Runs one picture or one text through a loaded encoder, before anything depends on it."""

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from features.encoders.image import ImageEncoder
from features.encoders.text import TextEncoder
from features.encoders.vectors import LookedUpTexts
from features.encoders.weights import check_storable, fenced
from features.errors import EncoderError

SENTENCE = "a photograph of a dog on a sofa"
WAY_OUT = "One that transformers runs was expected. Choose another, or another pooling."


def try_encoder(encoder: ImageEncoder | TextEncoder) -> None:
    """Encode a picture, or a short text and one that is cut at `max_length`.

    Raises:
        EncoderError: It cannot be done, or what comes out cannot be stored.
    """
    if isinstance(encoder, ImageEncoder):
        _try_image(encoder)
        return
    if isinstance(encoder.model, LookedUpTexts):  # which knows its own texts, all of them read
        return
    with fenced(f"The text encoder {encoder.name!r} cannot encode a text", WAY_OUT):
        features = encoder.encode([SENTENCE])
        _try_long(encoder)
    check_storable(f"the text encoder {encoder.name!r}", torch.from_numpy(features))


def _try_long(encoder: TextEncoder) -> None:
    """Encode a text that is cut at `max_length`, which may be more than there is memory for."""
    long = " ".join([SENTENCE] * min(encoder.tokenise.max_length, 512))
    try:
        replace(encoder).encode([long])  # a copy: its budget may become less
    except EncoderError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise


def _try_image(encoder: ImageEncoder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    with fenced(f"The image encoder {encoder.name!r} cannot encode an image", WAY_OUT):
        pixels = encoder.room_for(1)
        pixels.numpy()[0] = encoder.prepare(file.getvalue())
        try:
            features = encoder.encode(pixels)
        except torch.OutOfMemoryError as error:
            raise encoder.without_room() from error
    for column, each in zip(encoder.columns, features, strict=True):
        check_storable(f"the image column {column.name!r}", each)
