"""A device that runs out of memory: the batch is halved, and the run goes on."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from features.encoders.image import ImageEncoder
from features.errors import EncoderError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny


def extracted(run_file: Path, folder: Path) -> FeatureStore:
    overrides = [f"run.dir='{folder}'", "encoders.image.vit.batch_size=8"]
    return FeatureStore.open(extract(load_config(str(run_file), overrides), StopRequest())[0])


def with_room_for(images: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the encoder run out of memory above a number of images; returns the batches it gets."""
    encode = ImageEncoder.encode
    batches: list[int] = []

    def limited(
        self: ImageEncoder, pixels: torch.Tensor, columns: object = None, **options: object
    ) -> object:
        batches.append(len(pixels))
        if len(pixels) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(self, pixels, columns, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageEncoder, "encode", limited)
    return batches


def test_the_batch_is_halved_until_it_fits_and_every_row_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_file = tiny.world(tmp_path)
    expected = extracted(run_file, tmp_path / "whole").column("image/vit")
    batches = with_room_for(3, monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = extracted(run_file, tmp_path / "short").column("image/vit")
    np.testing.assert_array_equal(found.status(), expected.status())
    np.testing.assert_allclose(
        found.read(0, 40).astype(np.float32), expected.read(0, 40).astype(np.float32), atol=1e-3
    )
    assert batches[:7] == [1, 8, 4, 2, 2, 2, 2]  # it is tried with one image before a row is read
    assert set(batches[3:23]) == {2}  # it does not try the larger batch again
    messages = [record.message for record in caplog.records if "out of memory" in record.message]
    assert messages[:2] == [
        "image encoder vit: out of memory on cpu with 8 images at once; goes on with 4",
        "image encoder vit: out of memory on cpu with 4 images at once; goes on with 2",
    ]


def test_a_device_without_room_for_one_image_ends_the_run_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = tiny.world(tmp_path)
    with_room_for(0, monkeypatch)
    with pytest.raises(EncoderError, match=r"'vit' runs out of memory on cpu with a single image"):
        extracted(run_file, tmp_path / "none")
