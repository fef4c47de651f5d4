"""Workers that are killed, and units that fail, cost neither rows nor an endless loop."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.clusters import (
    ROOT,
    begin,
    cluster,
    done_chunks,
    end_commands,
    finish,
    members_of,
    wait_until,
    workers_of,
)
from tests.feature_stores import store_digests

CHUNKS = 75
# Both run as the main module of the command, and so of its workers too.
DEADLY_IMAGE = """
import os, signal
from features.index import SampleReader
from pipeline.cli import cli

read = SampleReader.read

def read_or_die(reader, start, stop):
    images = read(reader, start, stop)
    if b"deadly" in images:
        os.kill(os.getpid(), signal.SIGKILL)
    return images

SampleReader.read = read_or_die
if __name__ == "__main__":
    cli()
"""
SHARDS_THAT_VANISH = """
from pathlib import Path
from pipeline.cli import cli

if __name__ == "__main__":
    from pipeline.run.cluster import Cluster

    fill_encoder = Cluster.fill_encoder

    def remove_shards_and_fill(cluster, *arguments):
        for shard in Path(__file__).parent.glob("shards/*.tar"):
            shard.unlink()
        fill_encoder(cluster, *arguments)

    Cluster.fill_encoder = remove_shards_and_fill
    cli()
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose features in `inline` this process computed alone."""
    folder = tmp_path_factory.mktemp("world")
    run_file = tiny.world(folder, rows=CHUNKS * 8)
    extract(load_config(str(run_file), [f"run.dir='{folder / 'inline'}'"]), StopRequest())
    return run_file


@pytest.mark.slow
def test_a_worker_killed_within_a_unit_costs_no_row_and_no_byte(run_file: Path) -> None:
    run = run_file.parent / "killed"
    command = begin("extract", str(run_file), "--set", f"run.dir='{run}'", "--workers", "2")
    wait_until(lambda: done_chunks(run) > 0)
    victim = workers_of(command)[0]
    os.kill(victim, signal.SIGSTOP)  # now it cannot end its unit before it is killed
    time.sleep(0.1)
    assert done_chunks(run) < CHUNKS
    os.kill(victim, signal.SIGKILL)
    finish(command)

    assert store_digests(run) == store_digests(run_file.parent / "inline")
    assert verify_store(run / "features" / "train.zarr") == []


def sail_with_fault(fault: str, run_file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `sail extract` on two workers from a script beside the run file that injects a fault."""
    script = run_file.with_name("sail_with_fault.py")
    script.write_text(fault)
    return subprocess.run(
        [sys.executable, str(script), "extract", str(run_file), *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_what_kills_three_workers_in_a_row_is_named_and_ends_the_run(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=80)
    deadly = ("00013.jpg", b"deadly")  # in chunk 1 of 10
    members = [deadly if name == deadly[0] else (name, data) for name, data in tiny.samples(40)]
    tiny.write_tar(tmp_path / "shards" / "train-0.tar", members)

    done = sail_with_fault(DEADLY_IMAGE, run_file, "--workers", "2")

    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "The unit of chunks 1 to 1 of " in line
    # Dask may count a death before it hears that the unit had begun: then it is tried again.
    assert re.search(r"train image/vit ended [3-9] workers, one after the other", line), line
    assert "Traceback" not in done.stderr
    store = tmp_path / "run" / "features" / "train.zarr"
    assert [fault for fault in verify_store(store) if "is not done" not in fault] == []


@pytest.mark.slow
def test_an_error_within_a_unit_ends_the_run_with_that_line(tmp_path: Path) -> None:
    done = sail_with_fault(SHARDS_THAT_VANISH, tiny.world(tmp_path, rows=40), "--workers", "1")
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "train-0.tar cannot be opened (No such file or directory)" in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_scheduler_that_is_lost_ends_the_run_and_leaves_whole_chunks(run_file: Path) -> None:
    run = run_file.parent / "lost"
    with cluster(run_file.parent, workers=1) as (scheduler_file, scheduler):
        options = ["--set", f"run.dir='{run}'", "--scheduler", str(scheduler_file)]
        command = begin("extract", str(run_file), *options)
        wait_until(lambda: done_chunks(run) > 0)
        scheduler.kill()
        _, log = finish(command, expect=1)
    (line,) = [line for line in log.splitlines() if line.startswith("Error: ")]
    assert "The scheduler at tcp://127.0.0.1:" in line
    assert "is gone" in line
    faults = verify_store(run / "features" / "train.zarr")
    assert [fault for fault in faults if "is not done" not in fault] == []


def test_a_command_that_a_test_has_not_finished_is_ended_with_it() -> None:
    command = begin("doctor")
    assert members_of(command.pid) == [command.pid]
    end_commands()
    assert members_of(command.pid) == []
    assert command.returncode == -signal.SIGKILL
