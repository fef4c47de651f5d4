"""What is measured of an encoder is its rate in batches, and not that of what time is left for."""

from collections.abc import Sequence
from typing import cast

import pytest

from features.encoders import TextEncoder
from pipeline.planning import calibration
from pipeline.planning.calibration import measure_captions

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
