"""Locale, time zone and clock change nothing of what is extracted."""

import json
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
from tests.feature_stores import make_store, store_digests

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("odd", "encoding"),
    [
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, "utf-8"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
        ({"PYTHONIOENCODING": "ascii"}, "utf-8"),
    ],
)
def test_what_is_printed_in_a_locale_without_utf_8_is_the_same_document(
    odd: dict[str, str], encoding: str, tmp_path: Path
) -> None:
    words = {name: [f"läufe – 鳥 {row}" for row in range(8)] for name in ("bare", "long")}
    store = make_store(tmp_path / "s.zarr", rows=8, captions=words)
    said = []
    for environment in ({}, odd):
        for arguments in (["--json", "--row", "3"], ["--row", "3"]):
            done = subprocess.run(
                [sys.executable, "-m", "pipeline.cli", "inspect", str(store.path), *arguments],
                cwd=ROOT,
                env={"PATH": os.environ["PATH"]} | environment,
                capture_output=True,
                check=True,
            )
            said.append(done.stdout.decode(encoding if environment else "utf-8"))
    assert json.loads(said[0]) == json.loads(said[2])
    assert "caption/long" in said[3]
