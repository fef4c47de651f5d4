"""`sail eval --check`: embeddings of the same rows by several ways, through the real encoders."""

import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from features.encoders import load_image_encoder
from features.encoders.image import ImageEncoder
from pipeline.interrupt import StopRequest
from pipeline.run import check as drift
from pipeline.run.align import align_run
from pipeline.run.check import check_run
from pipeline.run.config import RunConfig, load_config
from pipeline.run.extract import extract
from tests import tiny
from tests.commands import sail, the_error_of
from tests.feature_stores import as_version_1

MEASURED = {
    ("image", "store"),
    ("image", "batch size"),
    ("image", "padding"),
    ("image", "image mode"),
    ("text", "store"),
    ("text", "batch size"),
}
NOT_MEASURED = {("text", "padding"), ("image", "device"), ("text", "device")}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a small run that was aligned."""
    run_file = tiny.world(tmp_path_factory.mktemp("world"), rows=48)
    config = load_config(str(run_file))
    extract(config, StopRequest())
    align_run(config, StopRequest())
    return run_file


@pytest.fixture
def copied(run_file: Path, tmp_path: Path) -> str:
    """A setting that puts a copy of the run, to be damaged, in the place of the run."""
    shutil.copytree(run_file.parent / "run", tmp_path / "run", symlinks=True)
    return f"run.dir={tmp_path / 'run'}"


@pytest.fixture(autouse=True)
def no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look the same on machines with a GPU."""
    monkeypatch.setattr(drift, "other_device", lambda _: None)


def check(run_file: Path, *options: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the drifts that a check which succeeds prints."""
    found = json.loads(sail("eval", run_file, "--check", "--json", *options).stdout)
    return {(each["modality"], each["over"]): each for each in found["drifts"]}


def test_a_check_that_is_stopped_says_that_it_wrote_nothing(
    run_file: Path, copied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: RunConfig, stop: StopRequest) -> None:
        signal.raise_signal(signal.SIGINT)
        check_run(config, stop)

    monkeypatch.setattr(drift, "check_run", stopped)
    result = sail("eval", run_file, "--check", "--set", copied, expect=130)
    assert "Stopped; nothing was written." in result.stderr
    assert not (Path(copied.removeprefix("run.dir=")) / "eval" / "check.json").exists()


def test_a_sound_run_drifts_little_and_says_how_it_was_measured(run_file: Path) -> None:
    sets = ("--set", "eval.check.rows=12", "--set", "eval.seed=3")
    printed = sail("eval", run_file, "--check", "--json", *sets).stdout
    written = run_file.parent / "run" / "eval" / "check.json"
    assert json.loads(printed) == json.loads(written.read_text())
    document = json.loads(printed)
    protocol = document["protocol"]
    expected = {"split": "test", "rows": 12, "drawn_from": 16, "seed": 3, "tolerance": 1e-3}
    expected |= {"image_batch": 4, "tokens_per_batch": 2048, "image_mode": "exact"}
    assert expected.items() <= protocol.items()
    assert document["ok"]
    by_name = {(each["modality"], each["over"]): each for each in document["drifts"]}
    assert by_name.keys() == MEASURED | NOT_MEASURED
    for name, found in by_name.items():
        if name in NOT_MEASURED:
            assert found["other"].startswith("not measured: ")
            assert found["min_cosine"] is found["changed_neighbours"] is None
        else:
            assert 1 - found["min_cosine"] < 1e-3
            assert 0 <= found["max_abs_difference"] < 0.05
    assert by_name["image", "store"]["max_abs_difference"] < 2e-3
    assert by_name["image", "image mode"]["max_abs_difference"] > 0  # torch rounds other pixels
    assert by_name["image", "batch size"]["usual"] == "4 at once"
    assert by_name["image", "padding"]["other"] == "2 and 2 blank"
    assert not written.with_name("results.json").exists()


def test_more_drift_than_is_tolerated_is_an_error_after_the_table(run_file: Path) -> None:
    result = sail("eval", run_file, "--check", "--set", "eval.check.tolerance=1e-12", expect=1)
    assert "image embeddings over image mode (exact against fast) by" in result.stderr
    assert "at most was expected" in result.stderr
    assert "Traceback" not in result.stderr
    assert "check.json" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "image mode" in line]
    assert "!" in line
    written = run_file.parent / "run" / "eval" / "check.json"
    assert json.loads(written.read_text())["ok"] is False


def test_features_that_are_not_those_of_their_rows_are_found(run_file: Path, copied: str) -> None:
    store = Path(copied.removeprefix("run.dir=")) / "features" / "test.zarr"
    features = zarr.open_group(store, mode="r+")["image/vit/features"]
    assert isinstance(features, zarr.Array)
    features[:] = np.roll(np.asarray(features[:]), 1, axis=0)
    as_version_1(store)
    result = sail("eval", run_file, "--check", "--set", copied, expect=1)
    assert "image embeddings over store (encoded now against as stored)" in result.stderr
    assert "text embeddings" not in result.stderr


def test_an_encoder_whose_images_see_each_other_is_found(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> ImageEncoder:
        encoder = load_image_encoder(*arguments)

        def forward(pixels: Tensor, wanted: Sequence[Any]) -> list[Tensor]:
            return [each - each.mean(0) / 2 for each in encoder.forward(pixels, wanted)]

        return replace(encoder, forward=forward)

    monkeypatch.setattr("pipeline.run.aligned.load_image_encoder", load)
    error = sail("eval", run_file, "--check", expect=1).stderr
    for over in ("store", "batch size", "padding"):
        assert f"image embeddings over {over} (" in error
    assert "text embeddings" not in error


def test_another_device_is_compared_in_the_same_types(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "other_device", lambda _: torch.device("cpu"))
    settings = ("--set", "encoders.text.bert.precision=float32", "--set", "run.device=cpu")
    found = check(run_file, *settings)
    for modality in ("image", "text"):
        assert found[modality, "device"]["max_abs_difference"] == 0
        assert found[modality, "device"]["changed_neighbours"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to compare with")
def test_a_gpu_gives_nearly_what_the_processor_gives(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    found = check(run_file, "--set", "run.device=cpu")
    assert found["image", "device"]["other"] == "cuda"
    assert 0 < found["image", "device"]["max_abs_difference"] < 1e-2


def test_an_index_of_other_rows_is_refused(run_file: Path, copied: str) -> None:
    index = Path(copied.removeprefix("run.dir=")) / "index"
    shutil.copy(index / "train.parquet", index / "test.parquet")
    error = the_error_of(sail("eval", run_file, "--check", "--set", copied, expect=1))
    assert "does not have 'test-0/01000' in row 0" in error
    assert "Use the run that extracted it." in error
