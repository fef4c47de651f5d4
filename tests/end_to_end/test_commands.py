"""The commands that a user types, from shards to the report, on small real parts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose three stages were done by the commands."""
    run_file = tiny.world(tmp_path_factory.mktemp("world"), rows=60)
    sail("extract", str(run_file))
    sail("align", str(run_file))
    sail("eval", str(run_file))
    return run_file


def test_the_three_stages_leave_results_and_a_report(run_file: Path) -> None:
    run = run_file.parent / "run"
    results = json.loads((run / "eval" / "results.json").read_text())
    assert results["schema"] == 1
    tasks = {row["task"] for row in results["results"]}
    assert {"retrieval/image_to_text", "retrieval/text_to_image"} <= tasks
    for row in results["results"]:
        assert {"task", "dataset", "metric", "value", "n", "ci95", "encoders", "protocol"} <= set(
            row
        )
        assert -1 <= row["value"] <= 1
    report = (run / "eval" / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert (run / "config.toml").is_file()


def test_stdout_is_the_result_only_and_json_when_asked(run_file: Path) -> None:
    done = sail("extract", str(run_file), "--json")
    stores = json.loads(done.stdout)
    assert [Path(store).name for store in stores] == ["train.zarr", "test.zarr"]
    assert json.loads(sail("eval", str(run_file), "--json").stdout)["schema"] == 1
    assert json.loads(sail("inspect", stores[0], "--json").stdout)["rows"] == 60
    assert "is whole" in sail("verify", stores[0]).stdout
    assert "train-0/00007" in sail("inspect", stores[0], "--row", "7").stdout


def test_stages_that_are_done_touch_no_file_as_of_a_run_that_is_read_only(run_file: Path) -> None:
    def times() -> dict[Path, int]:
        paths = [run_file.parent / "run", *(run_file.parent / "run").rglob("*")]
        return {path: path.lstat().st_mtime_ns for path in paths}

    before = times()
    for stage in ("extract", "align", "eval"):
        sail(stage, str(run_file))
        assert times() == before, stage


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("align", ["align.batchsize=4"], "Did you mean 'batch_size'?"),
        (
            "align",
            ["run.dir='/proc/nowhere/run'", "run.features='RUN/run'"],
            "The operating system refused",
        ),
        ("align", ["run.dir='RUN/other'"], "There is no feature store"),
        ("extract", ["run.dir='RUN/x'", "data.train.path='RUN/none-*.tar'"], "No file matches"),
        (
            "extract",
            ["run.dir='RUN/y'", "encoders.image.vit.model='RUN/novit'"],
            "neither a folder",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_1(
    command: str, overrides: list[str], words: str, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = [f"--set={each.replace('RUN', str(run_file.parent))}" for each in overrides]
    done = sail(command, str(run_file), *options, expect=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("align", ["run.seed=7"], "was trained with seed = 0"),
        ("eval", ["eval.knn=['test']", "eval.knn_reference=test"], "eval.knn names 'test'"),
    ],
)
def test_settings_that_are_refused_do_not_replace_those_of_the_run(
    command: str, overrides: list[str], words: str, run_file: Path
) -> None:
    record = run_file.parent / "run" / "config.toml"
    before = record.read_bytes()
    done = sail(command, str(run_file), *(f"--set={each}" for each in overrides), expect=1)
    assert words in done.stderr
    assert record.read_bytes() == before


def test_a_missing_recipe_and_a_wrong_option_have_their_own_exit_codes() -> None:
    assert "no recipe 'nothing.toml'" in sail("align", "nothing.toml", expect=1).stderr
    sail("align", "--nonsense", expect=2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_align_after_a_clean_save_and_it_goes_on_later(
    number: signal.Signals, code: int, run_file: Path, tmp_path: Path
) -> None:
    options = [
        f"--set=run.dir='{tmp_path}'",
        f"--set=run.features='{run_file.parent / 'run'}'",
        "--set=align.steps=1500",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "align", str(run_file), *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "align" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "goes on from here" in errors
    reached = json.loads(metrics.read_text().splitlines()[-1])["step"]
    sail("align", str(run_file), *options[:2], "--set=align.steps=1500", "--json")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == 1500
    assert reached < 1500
    assert steps == sorted(steps)


def test_further_shards_are_appended_on_request_and_the_head_says_that_the_rows_differ(
    tmp_path: Path,
) -> None:
    world = tiny.world(tmp_path)
    sail("extract", str(world))
    sail("align", str(world))
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(9, first=500))
    assert "run `sail extract` with --append" in sail("extract", str(world), expect=1).stderr
    store = sail("extract", str(world), "--append").stdout.split()[0]
    assert json.loads(sail("inspect", store, "--json").stdout)["rows"] == 49
    assert "is whole" in sail("verify", store).stdout
    assert "store.rows = 40, but this run has 49" in sail("align", str(world), expect=1).stderr
    sail("eval", str(world))  # the head that there is goes on to be of use
    other = [f"--set=run.dir='{tmp_path / 'again'}'", f"--set=run.features='{tmp_path / 'run'}'"]
    sail("align", str(world), *other)


def test_help_answers_without_loading_torch() -> None:
    code = "import sys, pipeline.cli; sys.exit('torch' in sys.modules or 'zarr' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
