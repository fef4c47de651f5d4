"""A pass of stage one says where its time goes, and what would make it faster."""

import json
import time
from pathlib import Path

import pytest

from features.extract import Phases
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.run import time_split
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.run.time_split import TimeSplit
from tests import tiny


@pytest.mark.parametrize(
    ("columns", "spent", "limit", "share"),
    [
        ("image/vit", Phases(encode=90.0, wait=5.0), "encoding", 0.9),
        ("image/vit", Phases(encode=20.0, wait=75.0, decode=150.0, read=9.0), "decoding", 0.75),
        ("image/vit", Phases(encode=20.0, wait=75.0, decode=9.0, read=150.0), "reading", 0.75),
        ("text/bert/long", Phases(encode=20.0, wait=75.0, decode=70.0), "tokenising", 0.75),
        ("image/vit", Phases(encode=40.0, wait=10.0, write=180.0), "writing", 0.9),
    ],
)
def test_what_a_pass_mostly_waits_for_is_its_limit(
    columns: str,
    spent: Phases,
    limit: str,
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    line = ProgressLine("train", 100, "rows")
    split = TimeSplit(tmp_path, line, spent, of={"split": "train", "columns": columns})
    clock[0] = 100.0
    assert split.limit()[0] == limit
    assert split.limit()[1] == pytest.approx(share)
    with caplog.at_level("INFO"):
        split.finish()
    assert f"train  {columns}: {limit} is the limit ({100 * share:.0f} % of 1 min 40 s)." in (
        caplog.text
    )
    (written,) = (tmp_path / "time.jsonl").read_text().splitlines()
    assert json.loads(written)["wait_seconds"] == spent.wait


def test_a_long_extraction_leaves_lines_and_curves_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time_split, "SECONDS_BETWEEN_LINES", -1)
    monkeypatch.setattr(time_split, "WORTH_TELLING", 0)
    with caplog.at_level("INFO"):
        extract(load_config(str(tiny.world(tmp_path, rows=24))), StopRequest())
    written = (tmp_path / "run/time.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in written]
    assert {(line["split"], line["columns"]) for line in lines} >= {
        ("train", "image/vit"),
        ("test", "text/bert/long"),
    }
    of_images = [line for line in lines if line["columns"] == "image/vit"]
    assert len(of_images) > 2
    assert of_images[-1]["encode_seconds"] > 0
    assert list((tmp_path / "run" / "tensorboard" / "extract").glob("events*"))
    assert "is the limit" in caplog.text


def test_a_short_extraction_leaves_no_log(tmp_path: Path) -> None:
    extract(load_config(str(tiny.world(tmp_path, rows=24))), StopRequest())
    assert not (tmp_path / "run/time.jsonl").exists()
