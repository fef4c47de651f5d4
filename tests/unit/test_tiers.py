"""Where the rows are kept, by their size and what the memory holds."""

import logging
from pathlib import Path

import pytest

from align.columns import Columns
from align.config import AlignConfig
from align.windows import MIB, Needs, plan_memory, shares
from features.errors import TrainingError
from tests.feature_stores import IMAGE, TEXT, make_store

CHUNK = 16 * 2 * (8 + 2 * 10)  # bytes of a chunk of the store below
BUFFER = 16 * 2 * 10  # what one thread reads into
BATCH = 24 * 2 * (8 + 2 * 10)


@pytest.fixture
def needs(tmp_path: Path) -> Needs:
    columns = Columns.open(make_store(tmp_path / "s.zarr"), AlignConfig(), IMAGE, TEXT)
    return Needs(columns, share=24, captions=2, with_caption_ids=False)


@pytest.mark.parametrize(
    ("device_bytes", "host_bytes", "tier", "words"),
    [
        (13 * CHUNK + BATCH, 0, "device", "read once and stay on cuda:0"),
        (13 * CHUNK + BATCH, 1 << 40, "device", "read once and stay on cuda:0"),
        (13 * CHUNK + BATCH - 1, 13 * CHUNK, "host", "read once and stay in host memory"),
        (13 * CHUNK + BATCH - 1, 13 * CHUNK - 1, "streaming", "windows of 5 of 13 chunks"),
    ],
)
def test_the_tier_is_the_first_that_holds_everything_and_the_log_says_which(
    needs: Needs,
    device_bytes: int,
    host_bytes: int,
    tier: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        plan = plan_memory(
            [needs], device_bytes=device_bytes, host_bytes=host_bytes, device="cuda:0"
        )
    assert plan.tier == tier
    assert words in caplog.text


def test_two_windows_and_a_batch_take_no_more_than_the_memory(needs: Needs) -> None:
    for memory in range(2 * CHUNK + BATCH + BUFFER, 13 * CHUNK + BATCH, CHUNK // 3):
        plan = plan_memory([needs], device_bytes=memory, host_bytes=0, device="cpu")
        rest = memory - BATCH - plan.readers * BUFFER
        assert 1 <= plan.readers <= 4
        assert 2 * plan.chunks[0] * CHUNK <= rest < 2 * (plan.chunks[0] + 1) * CHUNK


def test_windows_of_several_stores_last_as_long_and_a_small_store_is_kept_whole(
    needs: Needs, tmp_path: Path
) -> None:
    tiny = make_store(tmp_path / "tiny.zarr", rows=20)
    small = Needs(Columns.open(tiny, AlignConfig(), IMAGE, TEXT), 8, 2, with_caption_ids=False)
    large = Needs(needs.columns, 16, 2, with_caption_ids=False)
    memory = BATCH + 4 * 2 * BUFFER + 2 * CHUNK + 10 * CHUNK
    plan = plan_memory([large, small], device_bytes=memory, host_bytes=0, device="cpu")
    assert plan.chunks == (5, 2)
    halves = [Needs(needs.columns, 12, 2, with_caption_ids=False)] * 2
    assert plan_memory(halves, device_bytes=memory, host_bytes=0, device="cpu").chunks == (3, 3)
    assert plan.readers == 4


def test_too_little_memory_says_how_much_would_do(needs: Needs) -> None:
    with pytest.raises(TrainingError, match=r"align\.memory_mb = 0 .* At least 1 were expected"):
        plan_memory(
            [needs], device_bytes=2 * CHUNK + BATCH + BUFFER - 1, host_bytes=0, device="cpu"
        )
    plan_memory([needs], device_bytes=MIB, host_bytes=0, device="cpu")


def test_the_places_of_a_batch_are_divided_by_the_weights() -> None:
    assert shares([1.0], 7) == [7]
    assert shares([1.0, 2.0], 9) == [3, 6]
    assert shares([1.0, 1.0, 1.0], 10) == [4, 3, 3]
    assert shares([0.001, 1.0], 10) == [0, 10]
