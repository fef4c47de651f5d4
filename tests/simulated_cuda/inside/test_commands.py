"""The whole pipeline of a small world on the second GPU: no race, no other device, few waits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from features.status import Status
from features.store import FeatureStore
from tests import tiny
from tests.commands import sail, the_error_of
from tests.simulated_cuda import gpu, streams

pytestmark = pytest.mark.slow
MEASURES = [
    'eval.zero_shot=["test"]',
    'eval.knn=["test"]',
    'eval.compositional=["test"]',
    'eval.templates=["the {}", "a {} circle"]',
    'eval.alignment=["test"]',
    "eval.alignment_k=3",
    "eval.linear_probe_rows=1000",
]
WAITS_OF_EXTRACTION = {
    "features/extract.py:_to_host.<locals>.wait",  # for the features of the batch before
    # Once, when an encoder is loaded:
    "features/images.py:Preprocessing.normaliser",
    "features/encoders/image.py:load_image_encoder",
    "features/encoders/large.py:lay_out",
    "features/encoders/pretrained.py:_pooled",
    "features/encoders/weights.py:check_storable",
    # Once for the captions of a chunk:
    "features/encoders/text.py:TextEncoder.encode_tokens",
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    path = tiny.world(folder, rows=48)
    broken = [(n, b"no picture" if n == "02001.jpg" else d) for n, d in tiny.samples(8, first=2000)]
    tiny.write_tar(folder / "shards" / "train-2.tar", broken)
    (folder / "shards" / "classes.txt").write_text("red\ngreen\nblue\nstar\nsquare\n")
    return path


@pytest.mark.parametrize(
    ("command", "settings"),
    [("extract", []), ("align", ["align.precision=auto"]), ("eval", MEASURES)],
)
def test_a_stage_stays_on_the_second_gpu(run_file: Path, command: str, settings: list[str]) -> None:
    streams.set_device(0)
    gpu.seen.clear()
    options = [word for each in ["run.device=cuda:1", *settings] for word in ("--set", each)]
    sail(command, run_file, *options)
    assert list(gpu.seen.races.values()) == []
    assert streams.contexts == {1}
    if command == "extract":
        places = {place for _, _, place in gpu.seen.waits if not place.startswith("tests/")}
        assert places <= WAITS_OF_EXTRACTION
        # A batch that has lost a picture is copied as the others are: from pinned memory.
        of_batches = ("features/extract.py", "features/encoders/image.py:ImageEncoder")
        assert [place for place in gpu.seen.pageable if place.startswith(of_batches)] == []
        column = FeatureStore.open(run_file.parent / "run/features/train.zarr").column("image/vit")
        assert np.flatnonzero(column.status() != Status.OK).tolist() == [49]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_no_memory_in_an_evaluation_is_one_line_and_the_next_one_ends_it(
    run_file: Path, error: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    resamples = 61 if error is torch.AcceleratorError else 62  # else nothing is measured again
    changed = ("--set", "run.device=cuda:1", "--set", f"eval.bootstrap={resamples}")
    results = run_file.parent / "run" / "eval" / "results.json"
    before = results.read_bytes() if results.exists() else b""
    gpu.seen.clear()
    gpu.seen.fails_at = 60  # the weights of the head are fewer
    monkeypatch.setattr(gpu.seen, "fails_with", error)
    said = the_error_of(sail("eval", run_file, *changed, expect=1))
    assert "Retrieval on test ran out of memory on cuda:1, which has" in said
    assert "run.device = cpu" in said
    assert (results.read_bytes() if results.exists() else b"") == before
    gpu.seen.clear()
    sail("eval", run_file, *changed)
    assert results.read_bytes() != before


def test_pictures_after_a_broken_one_keep_their_features(run_file: Path, tmp_path: Path) -> None:
    cpu = ("--set", f"run.dir={tmp_path}", "--set", "encoders.image.vit.precision=float32")
    sail("extract", run_file, *cpu, "--set", "run.device=cpu")
    stores = [
        FeatureStore.open(each / "features/train.zarr")
        for each in (tmp_path, run_file.parent / "run")
    ]
    expected, found = (each.column("image/vit").read(0, 56).astype(np.float32) for each in stores)
    np.testing.assert_allclose(found, expected, atol=5e-2)
