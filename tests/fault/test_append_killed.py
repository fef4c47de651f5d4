"""A store that is killed while it takes further rows has its old rows, and then all."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from features.index import Index
from features.status import Status
from features.storage.place import Place
from features.store import FeatureStore, extend_store
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
ROWS, MORE_ROWS = 18, 9  # in chunks of 8: the last is not full before, nor after
KILLS = 5

GROW_AND_DIE = """
import os, shutil, signal, sys
from pathlib import Path
from features.store import extend_store
from features.index import Index
from features.store import FeatureStore

PLACES = {"os.rename": 1, "os.remove": 0}  # what changes the store, and not what lies beside it
source, index = Path(sys.argv[1]), Path(sys.argv[2])
after = 0
survived = False
while not survived:  # a process of its own for each moment; the imports are done once
    if os.fork() == 0:
        store = source.with_name(f"{after}.zarr")
        shutil.copytree(source, store)
        left = after

        def die_in_time(event, arguments):
            global left
            if event in PLACES and ".partial" not in str(arguments[PLACES[event]]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die_in_time)
        extend_store(FeatureStore.open(store), Index.open(index), append=False)
        os._exit(0)
    survived = os.wait()[1] == 0
    after += 1
print(after - 1)
"""
APPEND = """
import sys
from pipeline.run.config import load_config
from pipeline.interrupt import StopRequest
from pipeline.run.extract import extract

config = load_config(sys.argv[1])
print("started", flush=True)
extract(config, StopRequest(), append=True)
"""


def digests(store: Place) -> dict[str, str]:
    """Hash every file of a store; what a killed run left half-written would show too."""
    assert isinstance(store, Path)
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


class Expected:
    """Keys and features of all rows, extracted at once."""

    def __init__(self, store: FeatureStore) -> None:
        self.path = store.path
        self.keys = store.keys().tolist()
        self.features = {name: store.column(name).read(0, store.rows) for name in store.columns()}

    def check(self, path: Path) -> int:
        """See that nothing is wrong with a store but what is not done yet; return its rows.

        Rows that are ok have these features, and the keys are the first of these.
        """
        assert [fault for fault in verify_store(path) if "to finish it." not in fault] == []
        store = FeatureStore.open(path)
        assert store.keys().tolist() == self.keys[: store.rows]
        for name, expected in self.features.items():
            column = store.column(name)
            ok = column.status() == Status.OK
            found = column.read(0, store.rows)
            np.testing.assert_array_equal(found[ok], expected[: store.rows][ok])
        return store.rows


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run whose features are done, to whose source a shard came then."""
    run_file = tiny.world(tmp_path, rows=ROWS)
    extract(load_config(str(run_file)), StopRequest())
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(MORE_ROWS, first=500))
    return run_file


@pytest.fixture
def fresh(run_file: Path, tmp_path: Path) -> Expected:
    """All rows, extracted at once."""
    config = load_config(str(run_file), [f"run.dir='{tmp_path / 'fresh'}'"])
    return Expected(FeatureStore.open(extract(config, StopRequest())[0]))


@pytest.mark.slow
def test_killed_before_any_change_on_disk_a_store_has_its_old_rows_and_can_go_on(
    run_file: Path, fresh: Expected, tmp_path: Path
) -> None:
    store = tmp_path / "run" / "features" / "train.zarr"
    grown_index = tmp_path / "grown.parquet"
    shutil.copytree(store, tmp_path / "killed" / "old.zarr")
    extract(load_config(str(run_file)), StopRequest(), append=True)
    shutil.copy(tmp_path / "run" / "index" / "train.parquet", grown_index)
    moments = int(
        subprocess.run(
            [sys.executable, "-c", GROW_AND_DIE, tmp_path / "killed" / "old.zarr", grown_index],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    whole = digests(tmp_path / "killed" / f"{moments}.zarr")
    assert moments >= 20
    rows = []
    for moment in range(moments):
        path = tmp_path / "killed" / f"{moment}.zarr"
        rows.append(fresh.check(path))
        grown = extend_store(FeatureStore.open(path), Index.open(grown_index), append=False)
        assert grown.rows == ROWS + MORE_ROWS
        assert digests(path) == whole, moment
    assert rows == sorted(rows)
    assert set(rows) == {ROWS, ROWS + MORE_ROWS}


@pytest.mark.slow
def test_kills_at_random_moments_of_an_append_leave_the_bytes_of_a_fresh_extraction(
    run_file: Path, fresh: Expected, tmp_path: Path
) -> None:
    store = tmp_path / "run" / "features" / "train.zarr"
    moments = random.Random(0)
    kills = 0
    for _ in range(KILLS):
        with appending(run_file) as process:
            try:
                process.wait(timeout=moments.uniform(0, 0.3))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
        fresh.check(store)
    with appending(run_file) as process:
        assert process.wait() == 0
    assert kills >= KILLS // 2
    assert digests(store) == digests(fresh.path)
    assert verify_store(store) == []


def appending(run_file: Path) -> subprocess.Popen[str]:
    """Begin to append, and return once its imports are done."""
    process = subprocess.Popen(
        [sys.executable, "-c", APPEND, str(run_file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process
