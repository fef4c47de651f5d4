"""What is measured of an encoder is its rate in batches, once it is warm and there is time."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
import torch

from features.encoders import ImageEncoder, TextEncoder
from features.index import Index
from pipeline.planning import passes as calibration
from pipeline.planning.passes import measure_captions, measure_images

SECONDS_PER_CALL = 0.1
SECONDS_PER_CAPTION = 0.001


class Clock:
    """Time goes by only while captions are encoded."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Encoder:
    """Each call has a cost of its own, as on a GPU."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.sizes: list[int] = []

    def tokenise(self, captions: Sequence[str]) -> list[list[int]]:
        return [[1, 2] for _ in captions]

    def encode_tokens(self, tokens: Sequence[list[int]]) -> None:
        self.sizes.append(len(tokens))
        self.clock.now += SECONDS_PER_CALL + SECONDS_PER_CAPTION * len(tokens)


@pytest.mark.parametrize("seconds", [0, 0.5, 1, 2, 3, 4, 5, 7.5, 10])
def test_the_rate_of_captions_is_that_of_the_largest_batch(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    encoder = Encoder(clock)
    monkeypatch.setattr(calibration, "time", clock)
    rates = measure_captions(
        cast(TextEncoder, encoder), [f"caption {i}" for i in range(100)], seconds=seconds
    )
    assert rates is not None
    largest = max(encoder.sizes)
    expected = largest / (SECONDS_PER_CALL + SECONDS_PER_CAPTION * largest)
    assert rates.encode == pytest.approx(expected)


class Images:
    """The first image takes longer to decode, as where a library loads with it."""

    batch_size = 1
    device = torch.device("cpu")
    max_pixels = 1

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.is_warm = False

    def prepare(self, _data: bytes) -> np.ndarray:
        self.clock.now += 0.01 if self.is_warm else 5
        self.is_warm = True
        return np.zeros((3, 2, 2), dtype=np.uint8)

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        self.clock.now += 0.1
        return [pixels]


def test_the_rate_of_decoding_is_not_that_of_the_first_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(calibration, "time", clock)
    monkeypatch.setattr(calibration, "SampleReader", lambda *_, **__: None)
    monkeypatch.setattr(calibration, "_first_images", lambda *_: ([b"image"], 1.0))
    rates = measure_images(cast(ImageEncoder, Images(clock)), cast(Index, None), seconds=3)
    assert rates["decode"] == pytest.approx(100)
