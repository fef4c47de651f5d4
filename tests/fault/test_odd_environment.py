"""Locale, time zone and clock change nothing of what is extracted."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from features.errors import SourceError
from features.storage.files import partial_path
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny
from tests.feature_stores import store_digests

ROOT = Path(__file__).resolve().parents[2]
IN_THE_FUTURE = 4_000_000_000  # the year 2096
BEFORE_1970 = -400_000_000
CAPTIONS = '{"short": "läufe 🟥", "long": "ein roter Kreis ١٢٣"}'.encode()


def extract_into(run_file: Path, run: Path) -> None:
    extract(load_config(str(run_file), [f"run.dir='{run}'"]), StopRequest())


def set_times(folder: Path, seconds: int) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (seconds, seconds))


@pytest.mark.slow
def test_an_odd_locale_and_time_zone_give_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "Ünï 🟥"
    run_file = tiny.world(folder, rows=12)
    members = [("é.jpg", tiny.encoded(tiny.picture(1))), ("é.json", CAPTIONS)]
    tiny.write_tar(folder / "shards" / "train-1.tar", members)
    extract_into(run_file, folder / "whole")
    odd = {"LC_ALL": "C", "LANG": "xx_YY.ISO-8859-1", "LANGUAGE": "tr", "TZ": "Nowhere/Odd-13:37"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "extract", str(run_file)],
        cwd=ROOT,
        env={key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ} | odd,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert str(folder / "run" / "features" / "train.zarr") in done.stdout.decode()
    assert store_digests(folder / "run") == store_digests(folder / "whole")


@pytest.mark.parametrize("seconds", [IN_THE_FUTURE, BEFORE_1970])
def test_files_of_another_century_are_extracted_once_and_no_more(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    set_times(tmp_path, seconds)
    extract_into(run_file, tmp_path / "run")
    set_times(tmp_path / "run", seconds)  # as a clock that was wrong then would have it
    monkeypatch.setattr("pipeline.run.filling.load_encoder", None)  # a call is a TypeError
    extract_into(run_file, tmp_path / "run")


def test_a_clock_that_jumps_back_takes_no_file_from_its_writer(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    extract_into(run_file, tmp_path / "run")
    index = tmp_path / "run" / "index" / "train.parquet"
    ours = partial_path(index)
    name = ours.name.split(".")
    name[-2] = "0" * 12 + name[-2][12:]  # the same as a writer on another machine names it
    theirs = ours.with_name(".".join(name))
    theirs.write_bytes(b"half-written")
    os.utime(theirs, (time.time() + 7_200, time.time() + 7_200))  # their clock, or ours, is off
    (tmp_path / "run" / "features" / "train.zarr" / "image/vit/status/c/0").unlink()
    index.unlink()
    extract_into(run_file, tmp_path / "run")
    assert theirs.read_bytes() == b"half-written"


@pytest.mark.parametrize("seconds", [IN_THE_FUTURE, BEFORE_1970])
def test_a_shard_with_another_time_is_judged_by_its_content(seconds: int, tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    extract_into(run_file, tmp_path / "run")
    shard = tmp_path / "shards" / "train-1.tar"
    os.utime(shard, (seconds, seconds))  # as of a copy
    extract_into(run_file, tmp_path / "run")
    shard.write_bytes(shard.read_bytes().replace(b"JFIF", b"JFIX", 1))  # of the same size
    os.utime(shard, (seconds, seconds))
    with pytest.raises(SourceError, match=r"train-1\.tar has changed since it was indexed"):
        extract_into(run_file, tmp_path / "run")
