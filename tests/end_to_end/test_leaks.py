"""Pictures that are measured on and were trained on too are counted, and said in the report."""

import json
import shutil
from pathlib import Path

import pytest

from evaluate.measures import leaks
from tests.commands import sail
from tests.feature_stores import make_run, make_store

ALIGN = """
batch_size = 16
steps = 3
head = { kind = "linear", dim = 8 }
[eval]
bootstrap = 0
alignment_permutations = 0
alignment_subsamples = 0
"""
SPLIT = '[data.{}]\nkind = "folder"\npath = "table.jsonl"\n'
DIM = 64  # so that no two rows of random numbers look alike


def run_with(folder: Path, rows: int) -> Path:
    """A run with the splits `same`, a copy of what is trained on, and `other`."""
    run_file = make_run(folder, ALIGN)
    run_file.write_text(run_file.read_text() + SPLIT.format("same") + SPLIT.format("other"))
    features = folder / "features"
    shutil.rmtree(features / "train.zarr")
    make_store(features / "train.zarr", rows=rows, image_dim=DIM)
    shutil.copytree(features / "train.zarr", features / "same.zarr")
    make_store(features / "other.zarr", rows=50, image_dim=DIM, seed=7, bad_images=(3,))
    return run_file


def measured(run_file: Path) -> dict[str, dict[str, object]]:
    document = json.loads(sail("eval", run_file, "--json").stdout)
    return {each["dataset"]: each for each in document["results"] if each["task"] == "leaks"}


@pytest.mark.slow
def test_a_test_split_that_was_trained_on_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = run_with(tmp_path / "run", rows=200)
    sail("align", run_file)
    found = measured(run_file)
    assert (found["same"]["value"], found["same"]["n"]) == (1.0, 200)
    assert (found["other"]["value"], found["other"]["n"]) == (0.0, 49)
    assert "200 of 200 pictures of same were trained on, too" in caplog.text
    assert "pictures of other were" not in caplog.text
    page = (tmp_path / "run" / "eval" / "report.html").read_text()
    assert "it was not trained on; but 100.0 % of those of same it was trained on, too" in page
    assert "leaks" in sail("eval", run_file).stdout
    # of large splits a bounded part is compared, and the protocol says how much
    monkeypatch.setattr(leaks, "MOST_QUERIES", 50)
    monkeypatch.setattr(leaks, "ROWS_FOR_MEAN", 64)
    monkeypatch.setattr(leaks, "MOST_PRODUCTS", 50 * DIM * 96)
    shutil.rmtree(tmp_path / "run" / "eval")
    same = measured(run_file)["same"]
    assert same["n"] == 50
    assert 0.3 < float(str(same["value"])) < 0.7
    protocol = same["protocol"]
    assert isinstance(protocol, dict)
    assert (protocol["trained_rows_compared"], protocol["trained_rows"]) == (
        88,
        200,
    )  # the last chunk is shorter
