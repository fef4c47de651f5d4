"""What gives access stays in the environment: no log, no file of a run, and no store has it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail

SECRET = "a-word-that-stands-nowhere-else"


@pytest.mark.slow
def test_credentials_in_the_environment_reach_neither_the_log_nor_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    run_file = tiny.world(tmp_path)
    result = subprocess.run(  # a process of its own: its log goes to its own stderr
        [sys.executable, "-m", "pipeline.cli", "extract", str(run_file), "--verbose"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr
    assert SECRET not in result.stdout + result.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.toml" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_credentials_in_a_url_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    store = f"extract.store=s3://key:{SECRET}@bucket/stores"
    result = sail("extract", run_file, "--verbose", "--set", store, expect=1)
    assert SECRET not in result.stdout + result.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
