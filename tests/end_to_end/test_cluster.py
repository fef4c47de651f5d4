"""`sail extract` on workers: the same stores as without, and a clean end whatever happens."""

import hashlib
import os
import signal
from pathlib import Path

import pytest

from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.clusters import begin, cluster, done_chunks, finish, wait_until
from tests.feature_stores import store_digests
from tests.servers import Bucket

BROKEN = ("00007.jpg", b"\xff\xd8\xff\xe0 not all of it")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file with a broken image, whose features in `inline` this process computed alone."""
    folder = tmp_path_factory.mktemp("world")
    run_file = tiny.world(folder, rows=400)
    members = [BROKEN if name == BROKEN[0] else (name, data) for name, data in tiny.samples(200)]
    tiny.write_tar(folder / "shards" / "train-0.tar", members)
    extract(load_config(str(run_file), [f"run.dir='{folder / 'inline'}'"]), StopRequest())
    return run_file


@pytest.mark.slow
def test_two_workers_leave_the_bytes_of_one_process(run_file: Path) -> None:
    run = run_file.parent / "two"
    command = begin("extract", str(run_file), "--set", f"run.dir='{run}'", "--workers", "2")
    output, log = finish(command)

    assert store_digests(run) == store_digests(run_file.parent / "inline")
    stores = [run / "features" / "train.zarr", run / "features" / "test.zarr"]
    assert output.split() == [str(store) for store in stores]
    assert [verify_store(store) for store in stores] == [[], []]
    assert "2 workers; dashboard at http://127.0.0.1:" in log
    assert "quarantined row 7 (train-0/00007): truncated image" in log
    assert log.count("train  image/vit  400 / 400 rows") == 1  # one line for all workers


@pytest.mark.slow
def test_workers_write_the_same_objects_to_a_bucket(run_file: Path, s3: Bucket) -> None:
    options = [f"run.dir='{run_file.parent / 'remote'}'", f"extract.store={s3.url('stores')}"]
    settings = [argument for option in options for argument in ("--set", option)]
    finish(begin("extract", str(run_file), "--workers", "1", *settings))
    found = s3.content("stores")
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    expected = store_digests(run_file.parent / "inline")
    assert digests == {name.removeprefix("features/"): each for name, each in expected.items()}


@pytest.mark.slow
def test_ctrl_c_ends_a_command_and_its_workers_after_their_chunks(run_file: Path) -> None:
    run = run_file.parent / "interrupted"
    command = begin("extract", str(run_file), "--set", f"run.dir='{run}'", "--workers", "2")
    wait_until(lambda: done_chunks(run) > 0)
    os.killpg(command.pid, signal.SIGINT)  # a terminal sends it to the workers too
    _, log = finish(command, expect=130)
    assert "Stopped; what is done is saved." in log
    assert "Restarting worker" not in log  # none died of it
    faults = verify_store(run / "features" / "train.zarr")
    assert [fault for fault in faults if "is not done" not in fault] == []


@pytest.mark.slow
def test_a_stopped_command_leaves_its_cluster_idle_and_the_next_one_goes_on(
    run_file: Path,
) -> None:
    run = run_file.parent / "stopped"
    with cluster(run_file.parent, workers=2) as (scheduler_file, _):
        options = ["extract", str(run_file), "--set", f"run.dir='{run}'"]
        options += ["--scheduler", str(scheduler_file)]
        first = begin(*options)
        wait_until(lambda: done_chunks(run) > 0)
        first.send_signal(signal.SIGTERM)
        output, log = finish(first, expect=143)
        assert output == ""
        assert "Stopped; what is done is saved." in log
        done = done_chunks(run)
        assert 0 < done < 50  # of 50: it did not go on to the end

        _, log = finish(begin(*options))
        assert f"train  image/vit: {400 - 8 * done} rows" in log  # nothing is done twice
    assert store_digests(run) == store_digests(run_file.parent / "inline")
