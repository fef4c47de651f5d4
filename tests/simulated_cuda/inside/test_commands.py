"""The whole pipeline of a small world on the second GPU: no race, no other device, few waits."""

from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail
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
    "features/encoders/pretrained.py:_pooled",
    "features/encoders/weights.py:check_storable",
    # Once for the captions of a chunk:
    "features/encoders/text.py:TextEncoder.encode_tokens",
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    path = tiny.world(folder, rows=48)
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
