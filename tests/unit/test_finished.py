"""A finished extraction is told without loading an encoder, and never when something changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from features.errors import SourceError, StoreMismatchError
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny
from tests.feature_stores import as_version_1

ROOT = Path(__file__).resolve().parents[2]
SECOND_RUN = """
import sys
from pipeline.run.config import load_config
from pipeline.interrupt import StopRequest
from pipeline.run.extract import extract

extract(load_config(sys.argv[1]), StopRequest())
print("torch" in sys.modules)
"""


def run(run_file: Path, *overrides: str) -> None:
    extract(load_config(str(run_file), overrides), StopRequest())


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run file of which everything was extracted."""
    run_file = tiny.world(tmp_path, rows=12)
    run(run_file)
    return run_file


def loads_torch(run_file: Path) -> bool:
    command = [sys.executable, "-c", SECOND_RUN, str(run_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout == "True\n"


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    # a call is a TypeError
    monkeypatch.setattr("pipeline.run.filling.load_image_encoder", None)
    monkeypatch.setattr("pipeline.run.filling.load_text_encoder", None)


@pytest.mark.slow
def test_a_finished_run_does_not_even_import_torch(run_file: Path) -> None:
    assert not loads_torch(run_file)
    (run_file.parent / "run" / "features" / "test.zarr" / "image/vit/status/c/1").unlink()
    assert loads_torch(run_file)
    assert not loads_torch(run_file)


def test_how_stage_one_runs_says_nothing_of_what_an_encoder_is(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    run(run_file, "extract.workers=1", f"extract.store='{run_file.parent / 'run' / 'features'}'")


def test_what_is_known_of_an_encoder_is_compared_with_the_store(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    attributes = run_file.parent / "run" / "features" / "train.zarr" / "image/vit" / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"cls"', '"mean"'))
    as_version_1(attributes.parents[2])
    with pytest.raises(StoreMismatchError, match=r"pooling = 'mean', .* expects 'cls'"):
        run(run_file)


def test_other_weights_of_the_same_size_and_time_are_found_out(run_file: Path) -> None:
    weights = run_file.parent / "vit" / "model.safetensors"
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreMismatchError, match="weights_sha256"):
        run(run_file)


@pytest.mark.parametrize("content", ["", "[1]", '{"image/vit": 3, "text/bert": {}}'])
def test_damaged_notes_mean_that_the_encoders_are_loaded(run_file: Path, content: str) -> None:
    notes = run_file.parent / "run" / "encoders.json"
    whole = notes.read_text()
    notes.write_text(content)
    run(run_file)
    assert notes.read_text() == whole


def test_too_many_bad_rows_are_refused_in_a_finished_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    tiny.write_tar(tmp_path / "shards" / "test-0.tar", [("x.jpg", b""), *tiny.samples(9)])
    run(run_file)
    forbid_loading(monkeypatch)
    with pytest.raises(SourceError, match="1 of 10 rows"):
        run(run_file, "extract.max_bad_fraction=0.05")
