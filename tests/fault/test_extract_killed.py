"""An extraction killed at any moment leaves whole chunks; the next run ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from features.store import FeatureStore
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.config import EncodersConfig, load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.feature_stores import store_digests
from tests.processes import forks

ROOT = Path(__file__).resolve().parents[2]
KILLS = 50


def extract_into(run_file: str, run: str) -> None:
    """Run stage one; the work of a process that may be killed."""
    extract(load_config(run_file, [f"run.dir='{run}'"]), StopRequest())


def begin(context: ForkServerContext, run_file: Path, run: Path) -> ForkServerProcess:
    process = context.Process(target=extract_into, args=(str(run_file), str(run)))
    process.start()
    return process


def seconds_of_a_whole_run(context: ForkServerContext, run_file: Path, run: Path) -> float:
    for folder in (run.with_name("warm-up"), run):
        begun = time.monotonic()
        process = begin(context, run_file, folder)
        process.join()
        assert process.exitcode == 0
    return time.monotonic() - begun


def assert_whole_as_far_as_it_goes(run: Path) -> None:
    for store in run.glob("features/*.zarr"):
        assert [fault for fault in verify_store(store) if "is not done" not in fault] == []


@pytest.mark.slow
def test_fifty_kills_at_random_moments_leave_the_bytes_of_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    run_file = tiny.world(tmp_path, rows=96)
    seconds = seconds_of_a_whole_run(forks(), run_file, tmp_path / "whole")
    whole = store_digests(tmp_path / "whole")
    moments = random.Random(0)
    kills, finished = 0, 0
    while kills < KILLS:
        run = tmp_path / f"killed-{finished}"
        process = begin(forks(), run_file, run)
        process.join(moments.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            assert_whole_as_far_as_it_goes(run)
        else:  # it was done before its moment came
            assert process.exitcode == 0
            assert store_digests(run) == whole
            finished += 1
    extract_into(str(run_file), str(run))
    assert store_digests(run) == whole
    assert verify_store(run / "features" / "train.zarr") == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_extract_after_the_chunk_at_hand_and_the_next_run_goes_on(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    run_file = tiny.world(tmp_path, rows=600)
    command = [sys.executable, "-m", "pipeline.cli", "extract", str(run_file)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    status = tmp_path / "run" / "features" / "train.zarr" / "image" / "vit" / "status" / "c"
    while not status.is_dir() or not any(status.iterdir()):
        time.sleep(0.001)
        assert process.poll() is None
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "goes on from here" in errors
    assert "Traceback" not in errors

    store = FeatureStore.open(tmp_path / "run" / "features" / "train.zarr")
    pending = store.column("image/vit").pending()
    assert 0 < len(pending) < store.num_chunks
    assert_whole_as_far_as_it_goes(tmp_path / "run")
    extract_into(str(run_file), str(tmp_path / "run"))
    extract_into(str(run_file), str(tmp_path / "whole"))
    assert store_digests(tmp_path / "run") == store_digests(tmp_path / "whole")


def test_a_signal_while_samples_are_listed_leaves_no_index_and_no_half_of_one(
    tmp_path: Path,
) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    config = load_config(str(run_file))
    listed = config.model_copy(update={"encoders": EncodersConfig()})  # listing comes first then
    with pytest.raises(Stopped):
        extract(listed, StopRequest(signal_number=signal.SIGTERM))
    assert not (tmp_path / "run").exists()
    extract(config, StopRequest())
    assert verify_store(tmp_path / "run" / "features" / "train.zarr") == []
