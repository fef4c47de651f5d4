"""Commands and Dask processes as a user would start them, and what is left of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 240.0
"""A process of torch takes seconds to start, and a minute on a machine with much else to do."""

_begun: list[subprocess.Popen[str]] = []


def begin(*arguments: str) -> subprocess.Popen[str]:
    """Start `sail` in a session of its own, its output captured; `end_commands` ends it at last."""
    command = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _begun.append(command)
    return command


def end_commands() -> None:
    """End what was started and is not finished, as after a test that failed."""
    while _begun:
        with _begun.pop() as command:
            if members_of(command.pid):
                os.killpg(command.pid, signal.SIGKILL)


def finish(command: subprocess.Popen[str], expect: int = 0) -> tuple[str, str]:
    """Wait for a command; return its output and log. Nothing that it started may live on."""
    output, log = command.communicate(timeout=PATIENCE_SECONDS)
    assert command.returncode == expect, log
    wait_until(lambda: not members_of(command.pid))
    return output, log


def members_of(session: int) -> list[int]:
    """Return the living processes of a session."""
    return [pid for pid, _, found, state in _processes() if found == session and state != "Z"]


def workers_of(command: subprocess.Popen[str]) -> list[int]:
    """Return the worker processes that a command started."""
    children = [pid for pid, parent, _, state in _processes() if parent == command.pid]
    return [pid for pid in children if "spawn_main" in _command_line(pid)]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Look often, until something is so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


def done_chunks(run: Path, column: str = "image/vit") -> int:
    """Return how many chunks of a column of the training split are done."""
    return len(list((run / "features" / "train.zarr" / column / "status" / "c").glob("[0-9]*")))


@contextmanager
def cluster(folder: Path, *, workers: int) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Run a scheduler and workers, as a user starts them; yields the scheduler and its file."""
    scheduler_file = folder / "scheduler.json"
    common = ["--scheduler-file", str(scheduler_file)]
    address = ["--host", "127.0.0.1"]
    commands = [
        ["dask_scheduler", *common, *address, "--port", "0", "--dashboard-address", "127.0.0.1:0"],
        *[["dask_worker", *common, *address, "--nthreads", "1", "--no-dashboard"]] * workers,
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{command[0]}", *command[1:]],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        wait_until(scheduler_file.is_file)
        yield scheduler_file, processes[0]
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _processes() -> Iterator[tuple[int, int, int, str]]:
    """Yield number, parent, session and state of every process (Linux)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        yield int(stat.parent.name), int(parent), int(session), state


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
