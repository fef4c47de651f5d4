"""Results are those of the head, the stores and the settings that are there, or are taken again."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.commands import sail, the_error_of


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose three stages are done."""
    run_file = tiny.world(tmp_path_factory.mktemp("world"), rows=24)
    for stage in ("extract", "align", "eval"):
        sail(stage, run_file)
    return run_file


@pytest.fixture
def run_file(evaluated: Path, tmp_path: Path) -> Iterator[Path]:
    """The run file; its folder is put back after the test."""
    folder = evaluated.parent
    shutil.copytree(folder, tmp_path / "kept", symlinks=True)
    yield evaluated
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder, symlinks=True)


def written(run_file: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((run_file.parent / "run/eval/results.json").read_text())
    return results


def values(run_file: Path, name: str = "value") -> list[Any]:
    return [each[name] for each in written(run_file)["results"]]


def test_nothing_is_measured_again_where_nothing_changed(run_file: Path) -> None:
    results = run_file.parent / "run/eval/results.json"
    before = results.stat().st_mtime_ns
    sail("eval", run_file)
    assert results.stat().st_mtime_ns == before


def test_a_head_trained_for_two_more_steps_is_measured(run_file: Path) -> None:
    before = written(run_file)
    align = run_file.parent / "run/align"
    steps = json.loads((align / "last/config.json").read_text())["total_steps"]
    shutil.rmtree(align)
    sail("align", run_file, f"--set=align.steps={steps + 2}", "--set=align.holdout=0.0")
    sail("eval", run_file)  # with the very settings of the first time
    after = written(run_file)
    assert after["checkpoint_sha256"] != before["checkpoint_sha256"]
    assert [row["value"] for row in after["results"]] != [row["value"] for row in before["results"]]


def test_features_extracted_anew_are_measured(run_file: Path) -> None:
    assert set(values(run_file, "n")) >= {16}  # images of the test split
    members = tiny.samples(16, first=1000)
    members[0] = (members[0][0], b"no image")
    tiny.write_tar(run_file.parent / "shards/test-0.tar", members)
    for old in ("run/features/test.zarr", "run/index/test.parquet"):
        path = run_file.parent / old
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    sail("extract", run_file)
    sail("eval", run_file)
    assert 16 not in values(run_file, "n")
    assert 15 in values(run_file, "n")


def test_another_setting_is_measured(run_file: Path) -> None:
    before = written(run_file)
    sail("eval", run_file, "--set=eval.bootstrap=51")
    assert written(run_file) != before


@pytest.mark.slow
def test_results_or_a_report_that_was_deleted_is_made_again(run_file: Path) -> None:
    before = written(run_file)
    for name in ("results.json", "report.html", "inputs.sha256"):
        (run_file.parent / "run/eval" / name).unlink()
        sail("eval", run_file)
        assert written(run_file) == before
        assert (run_file.parent / "run/eval/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "report.html", "items.npz", "inputs.sha256"])
def test_results_that_are_damaged_are_measured_again(name: str, run_file: Path) -> None:
    before, folder = written(run_file), run_file.parent / "run" / "eval"
    for content in (b"[" * 5000, b"{}", (folder / name).read_bytes().replace(b"0.", b"1.", 1)):
        (folder / name).write_bytes(content)
        sail("eval", run_file)
        assert written(run_file) == before


@pytest.mark.slow
def test_results_that_are_not_those_that_were_written_are_not_compared(run_file: Path) -> None:
    run = run_file.parent / "run"
    results = run / "eval" / "results.json"
    written(run_file)
    content = results.read_text()
    results.write_text(content.replace('"value": 0.', '"value": 1.', 1))
    error = the_error_of(sail("compare", run, run, expect=1))
    assert "results.json cannot be read: its sha256 is" in error
    results.unlink()
    error = the_error_of(sail("export", run, "--to", "hf", expect=1))
    assert f"{results} cannot be read: there is no such file" in error
    results.write_text(content)
    sail("compare", run, run, "--json")
