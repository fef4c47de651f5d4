"""One writer per run folder and stage: the second is told who is at it, and the first goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from features.errors import LockedError
from features.storage.lock import locked
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.run.folder import filling, stage_lock
from tests import tiny
from tests.commands import sail, the_error_of
from tests.trained import trained

ROOT = Path(__file__).resolve().parents[2]
WHO = rf"by another process \(process {os.getpid()} on \S+, since \d{{4}}-\d\d-\d\d [\d:]+ UTC\)"


HOLD = """
import signal, sys
from pathlib import Path
from features.storage.lock import locked

with locked(Path(sys.argv[1]), "it is held"):
    print("held", flush=True)
    signal.pause()
"""


def test_a_lock_is_held_by_one_and_free_after_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / ".align.lock"
    with locked(path, "the run is being written"):
        with (
            pytest.raises(LockedError, match=rf"the run is being written {WHO}. One at a time"),
            locked(path, "the run is being written"),
        ):
            pytest.fail("it was held already")
        assert path.is_file()
    with locked(path, "the run is being written"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"\(process {process.pid} on "),
            locked(path, "it is held"),
        ):
            pytest.fail("the other process held it")
        process.kill()
    assert path.is_file()  # which holds nobody up
    with locked(path, "it is held"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_those_who_share_a_lock_keep_out_who_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "x", shared=True), locked(path, "x", shared=True):
        with pytest.raises(LockedError, match=WHO), locked(path, "x is held"):
            pytest.fail("it was shared")
        assert len(path.read_text().splitlines()) == 2
    with locked(path, "x"), pytest.raises(LockedError), locked(path, "x", shared=True):
        pytest.fail("it was held alone")
    assert not path.exists()


def test_one_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    path, heard, order = tmp_path / "lock", threading.Event(), []

    def wait_for_it() -> None:
        with locked(path, "x is held", wait=lambda _words: heard.set()):
            order.append("second")

    thread = threading.Thread(target=wait_for_it)
    with locked(path, "x is held"):
        thread.start()
        assert heard.wait(10)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_has_no_locks(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with locked(tmp_path / "lock", "x"):
        assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_command_of_a_stage_is_told_at_once_who_is_at_it(tmp_path: Path) -> None:
    run = trained(tmp_path)
    recipe = tmp_path / "tiny.toml"
    config = load_config(str(recipe))
    for stage, command in [
        ("align", ("align", recipe)),
        ("eval", ("eval", recipe)),
        ("study", ("study", "--on", "test", recipe)),
        ("study", ("pick", "--on", "test", recipe)),
        ("sweep", ("sweep", "--over", "align.head.dim=4", recipe)),
    ]:
        with stage_lock(config, stage):
            before = contents(run)
            error = the_error_of(sail(*command, expect=1))
            assert re.search(rf"{run / stage} is being written {WHO}", error), error
            assert contents(run) == before


@pytest.mark.slow
def test_rows_are_added_while_nobody_fills_the_columns(tmp_path: Path) -> None:
    recipe = tiny.world(tmp_path, rows=12)
    sail("extract", recipe)
    tiny.write_tar(tmp_path / "shards" / "train-9.tar", tiny.samples(6, first=500))
    with filling(tmp_path / "run"):
        before = contents(tmp_path / "run")
        error = the_error_of(sail("extract", "--append", recipe, expect=1))
        assert re.search(rf"run/features is being filled {WHO}", error), error
        assert contents(tmp_path / "run") == before
    sail("extract", "--append", recipe)


def test_a_command_that_waits_for_another_to_make_the_rows_ready_can_be_stopped(
    tmp_path: Path,
) -> None:
    config = load_config(str(tiny.world(tmp_path, rows=12)))
    with locked(tmp_path / "run" / ".extract.lock", "x"), pytest.raises(Stopped):
        extract(config, StopRequest(signal.SIGTERM))
    assert not (tmp_path / "run").exists()


def begun(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "setting", "same"),
    [
        ("align", "align.epochs=300", "align/best/model.safetensors"),
        ("eval", "eval.bootstrap=100000", "eval/results.json"),
    ],
)
def test_of_two_commands_at_once_one_does_the_work_and_one_is_told(
    command: str, setting: str, same: str, tmp_path: Path
) -> None:
    run = trained(tmp_path)
    recipe, alone, both = str(tmp_path / "tiny.toml"), tmp_path / "alone", tmp_path / "both"

    def arguments(stage: str, folder: Path) -> list[str]:
        settings = [setting, f"run.dir='{folder}'", f"run.features='{run}'"]
        return [stage, recipe, *(f"--set={each}" for each in settings)]

    if command == "eval":
        for folder in (alone, both):
            sail(*arguments("align", folder))
    sail(*arguments(command, alone))
    with begun(*arguments(command, both)) as first:
        lock = both / f".{command}.lock"
        while not (lock.is_file() and lock.read_text()):
            assert first.poll() is None, first.communicate()
        first.send_signal(signal.SIGSTOP)  # now it cannot end before the second begins
        try:
            error = the_error_of(sail(*arguments(command, both), expect=1))
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(300) == 0, first.communicate()
    who = rf"another process \(process {first.pid} on"
    assert re.search(rf"both/{command} is being written by {who}", error), error
    assert (both / same).read_bytes() == (alone / same).read_bytes()
