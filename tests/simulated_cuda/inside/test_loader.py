"""What the loader hands to a training step on a GPU that is as late as its events allow."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.loader import MIB, Batch, Loader, LoaderOptions, Source
from tests.feature_stores import IMAGE, TEXT, make_store
from tests.simulated_cuda import gpu, streams

TIERS = {"device": (MIB, 0), "host": (9_000, MIB), "streaming": (9_000, 0)}
"""Bytes that a loader of each tier may take on the device and on the host."""
STEPS = 16  # of 24 rows: two epochs, and tens of windows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    store = make_store(tmp_path_factory.mktemp("store") / "s.zarr")
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.0, holdout_rows=10)
    return Source(columns, selection.train, selection.text_ok)


@pytest.fixture(autouse=True)
def _late_gpus() -> Iterator[None]:
    for index in range(streams.GPUS):
        streams.synchronize(index)
    gpu.seen.clear()
    streams.is_late = True
    yield
    streams.is_late = False
    streams.set_device(0)


def wrong_rows(loader: Loader, source: Source) -> int:
    """Count the rows that are not what the store has when a late step reads them."""
    image = source.columns.image.read(0, 200)
    text = np.stack([column.read(0, 200) for column in source.columns.text], axis=1)
    wrong = 0

    def step(batch: Batch) -> None:
        nonlocal wrong
        same = (gpu.host_copy(batch.image) == image[batch.rows]).all(axis=1)
        same &= (gpu.host_copy(batch.text) == text[batch.rows]).all(axis=(1, 2))
        wrong += int((~same).sum())

    for batch in loader.batches(0, STEPS):
        stream = streams.current_stream(batch.image.device)
        gpu.reads_later(stream, [batch.image, batch.text], partial(step, batch))
    streams.synchronize(loader.options.device)
    return wrong


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
def test_a_late_step_reads_the_rows_of_its_batch(
    source: Source, tier: str, index: int, current: int
) -> None:
    streams.set_device(current)
    device_bytes, host_bytes = TIERS[tier]
    options = LoaderOptions(
        batch_size=24,
        memory_bytes=device_bytes,
        host_memory_bytes=host_bytes,
        device=torch.device("cuda", index),
        with_caption_ids=True,
    )
    loader = Loader([source], options)
    assert loader.tier == tier
    assert wrong_rows(loader, source) == 0
    assert list(gpu.seen.races.values()) == []
    assert streams.contexts == {index}
