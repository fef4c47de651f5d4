"""`sail plan` says what a run will cost, from what is there and what is known."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter

from features.errors import SourceError
from features.sources import Source
from pipeline.cli import cli
from pipeline.planning.budget import rows_of
from tests import tiny


def plan(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["plan", *arguments])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def as_json(*arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(plan(*arguments, "--json"))
    return document


def webdataset(path: Path, **settings: Any) -> Source:
    source: Source = TypeAdapter(Source).validate_python(
        {"kind": "webdataset", "path": str(path / "*.tar"), **settings}
    )
    return source


def test_the_large_recipe_is_planned_without_its_data_and_weights() -> None:
    document = as_json("sail", "--rows", "23M", "--price", "2")
    assert document["splits"] == {
        "train": {"rows": 23_000_000, "found_in": "as given", "exact": True}
    }
    assert set(document["splits_left_out"]) == {"test"}
    images, short, long = document["passes"]
    assert images["flops_per_row"] == pytest.approx(162e9, rel=0.01)
    assert (short["tokens_from"], long["tokens_from"]) == ("assumed", "assumed")
    assert document["bytes"] == pytest.approx(23e6 * 2 * (1024 + 2 * 4096), rel=0.001)
    gpus = {gpu["gpu"]: gpu for gpu in document["gpus"]}
    assert gpus["A100"]["stage_one_hours"] > 2 * gpus["H100"]["stage_one_hours"]
    assert 1 / 60 < gpus["H100"]["stage_two_hours"] < 1  # minutes to an hour
    assert gpus["H100"]["euros"] == 2 * gpus["H100"]["total_hours"]
    assert document["this_machine"]["measured"] == []


def test_stage_two_trains_on_the_rows_that_the_recipe_takes() -> None:
    given = ["sail", "--rows", "23M", "--set", "align.epochs=2", "--set", "align.holdout=0.5"]
    assert as_json(*given)["stage_two"]["samples"] == 23e6
    assert as_json(*given, "--set", "align.rows=1000000")["stage_two"]["samples"] == 2e6
    assert as_json(*given, "--set", "align.steps=10")["stage_two"]["samples"] == 10 * 16384


def test_stage_two_works_on_the_captions_that_the_recipe_takes() -> None:
    given = ["sail", "--rows", "23M", "--set", "align.head={kind='linear',dim=8}"]
    both = as_json(*given)["stage_two"]
    drawn = as_json(*given, "--set", "align.captions_per_image=1")["stage_two"]
    named = as_json(*given, "--set", "align.fields=['long']")["stage_two"]
    assert named["bytes_per_epoch"] < drawn["bytes_per_epoch"] == both["bytes_per_epoch"]
    assert named["flops_per_sample"] == drawn["flops_per_sample"] < both["flops_per_sample"]


@pytest.mark.parametrize(("name", "rows"), [("sail", "all"), ("sail-paper", "8192")])
def test_the_memory_of_a_step_is_that_of_the_simulated_gpu(name: str, rows: str) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (told,) = re.findall(rf"`{name}` \| bfloat16 \| {rows} \| ([\d.]+) \| ([\d.]+) \|", docs)
    given = [] if rows == "all" else ["--set", f"align.micro_batch={rows}"]
    (step,) = as_json(name, "--rows", "1M", *given)["stage_two"]["memory"]["steps"]
    kept, peak = (float(number) * 2**30 for number in told)
    assert step["kept"] == pytest.approx(kept, rel=0.1)
    assert step["peak"] == pytest.approx(peak, rel=0.1)


def test_the_rows_in_the_heads_are_halved_until_a_step_fits() -> None:
    given = ["sail-paper", "--rows", "1M", "--set", "align.memory_mb=4096"]
    gpus = {gpu["gpu"]: gpu["micro_batch"] for gpu in as_json(*given)["gpus"]}
    assert gpus == {
        "A100": 32768,
        "H100": 32768,
        "H200": 32768,
        "L40S": 16384,
        "RTX 4090": 8192,
    }
    text = plan(*given, "--set", "align.micro_batch=32768")
    assert re.search(r"L40S .* does not fit", text)
    assert re.search(r"H200 .* all 32,768", text)


def test_the_table_says_what_is_assumed() -> None:
    text = plan("sail", "--rows", "23M")
    assert "23,000,000 rows (as given)" in text
    assert "40% for encoders" in text
    assert "162 GFLOP" in text
    assert "not measured: the data or the weights are not here" in text


def test_without_data_the_rows_must_be_given() -> None:
    assert "give them with --rows, such as 23M" in plan("sail", code=1)
    assert "no number of rows" in plan("sail", "--rows", "many", code=2)


def test_what_is_here_is_measured_on_this_machine(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    document = as_json(str(run_file), "--seconds", "1")
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind
    assert document["splits"]["train"] == {
        "rows": 40,
        "found_in": "listing its source",
        "exact": True,
    }
    images, *texts = document["passes"]
    assert images["pass"] == "image/vit"
    assert set(images["rows_per_second"]) == {"read", "decode", "encode", "write"}
    assert images["total_hours"] >= max(images["hours"].values()) > 0
    assert [text["pass"] for text in texts] == ["text/bert/long", "text/bert/short"]
    for text in texts:
        assert set(text["rows_per_second"]) == {"tokenise", "encode", "write"}
        assert "captions" in text["tokens_from"]
    assert document["this_machine"]["stage_one_hours"] > 0
    text = plan(str(run_file), "--seconds", "1")
    assert "image/vit" in text
    assert "all of stage one on this machine: " in text


@pytest.mark.parametrize("option", ["--seconds=0", "--price=-1"])
def test_a_number_that_makes_no_sense_is_refused(option: str) -> None:
    assert option.split("=")[0] in plan("demo", option, code=2)


def test_a_convolutional_encoder_has_its_work_counted(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    override = "--set=encoders.image.vit={model='bundled:scenes',pooling='pooler'}"
    images = as_json(str(run_file), "--seconds", "1", override)["passes"][0]
    assert images["flops_from"] == "its config.json"
    assert images["flops_per_row"] > 1e6


def test_splits_that_are_mixed_are_planned_together(tmp_path: Path) -> None:
    run_file = str(tiny.mixed_world(tmp_path))
    document = as_json(run_file, "--seconds", "1")
    assert {name: split["rows"] for name, split in document["splits"].items()} == {
        "one": 12,
        "two": 12,
        "test": 16,
    }
    assert document["stage_two"]["samples"] == 3 * round(24 * 0.8)
    assert as_json(run_file, "--seconds", "1", "--rows", "1k")["stage_two"]["samples"] == 3 * 1600


def test_rows_of_many_shards_are_taken_from_a_few_by_their_bytes(tmp_path: Path) -> None:
    for number in range(9):
        tiny.write_tar(tmp_path / f"{number}.tar", tiny.samples(10 + number, first=100 * number))
    source = webdataset(tmp_path)
    found = rows_of(tmp_path / "none", source, given=None, seconds=60)
    assert (found.found_in, found.is_exact) == ("3 of 9 files", False)
    assert found.count == pytest.approx(sum(range(10, 19)), rel=0.1)
    limited = rows_of(tmp_path / "none", webdataset(tmp_path, rows=7), given=None, seconds=60)
    assert (limited.count, limited.found_in) == (7, "`rows` of the source")


def test_a_long_shard_is_listed_for_as_long_as_there_is_time(tmp_path: Path) -> None:
    members = [(f"{number:05d}.jpg", bytes(3000)) for number in range(1000)]
    tiny.write_tar(tmp_path / "long.tar", members)
    found = rows_of(tmp_path / "none", webdataset(tmp_path), given=None, seconds=0)
    assert not found.is_exact
    assert found.count == pytest.approx(1000, rel=0.03)


def test_rows_of_parquet_files_are_in_their_footers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [bytes(100)] * 900}), tmp_path / "images.parquet")
    source = TypeAdapter(Source).validate_python({"kind": "parquet", "path": str(tmp_path / "*")})
    found = rows_of(tmp_path / "none", source, given=None, seconds=0)
    assert (found.count, found.is_exact) == (900, True)


def test_rows_of_a_source_that_is_not_there_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"No file matches "):
        rows_of(tmp_path / "none", webdataset(tmp_path), given=None, seconds=1)
