"""How units are cut and handed out; whole commands are in end_to_end and fault."""

import inspect
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed.worker
import pytest
from click.testing import CliRunner
from distributed import Client, Future, LocalCluster, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from hypothesis import given
from hypothesis import strategies as st

from features.errors import ClusterError
from features.store import FeatureStore
from pipeline.cli import cli
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run import cluster
from pipeline.run import cluster as connection
from pipeline.run.cluster import LEAST_UNITS, Cluster, cut_into_units, open_cluster
from pipeline.run.config import EncodersConfig, RunSettings, load_config
from pipeline.run.extract import extract
from pipeline.run.units import ClusterJob, device_settings, is_no_heartbeat
from tests import tiny
from tests.feature_stores import store_digests

JOB: ClusterJob = {"id": "j", "version": "1", "recipe": {}, "processors": 1, "share_gpus": True}


class Watcher(SchedulerPlugin):
    """Notes how many tasks wait or are at work at a time, and what they are called with."""

    name = "watcher"

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.most = 0
        self.messages: list[str] = []

    def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
        states = [task.state for task in self._scheduler.tasks.values()]
        self.most = max(self.most, sum(state in ("queued", "processing") for state in states))
        if start == "released" and finish != "forgotten":
            call: Any = self._scheduler.tasks[key].run_spec
            arguments = call.args
            self.messages.append(json.dumps([getattr(each, "value", each) for each in arguments]))


@pytest.fixture
def local() -> Iterator[LocalCluster]:
    """A cluster whose one worker is a thread of this process."""
    any_port = {"dashboard": False, "dashboard_address": ":0"}  # others may test beside us
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, scheduler_kwargs=any_port
    ) as local:
        yield local


@given(
    chunks=st.sets(st.integers(0, 6000), max_size=300),
    most=st.integers(1, 40),
    workers=st.integers(0, 16),
)
def test_units_hold_every_chunk_once_and_no_more_than_may_be(
    chunks: set[int], most: int, workers: int
) -> None:
    units = list(cut_into_units(sorted(chunks), most=most, num_workers=lambda: workers))
    assert list(itertools.chain(*units)) == sorted(chunks)
    assert all(1 <= len(unit) <= most for unit in units)


def test_a_column_of_23_million_rows_is_three_hundred_units_the_last_ones_small() -> None:
    units = list(cut_into_units(range(5616), most=32, num_workers=lambda: 8))
    assert len(units) == 302
    assert [len(units[0]), len(units[-1])] == [32, 1]


@pytest.mark.slow
def test_few_units_are_under_way_and_their_messages_are_names_and_numbers(
    tmp_path: Path, local: LocalCluster
) -> None:
    run_file = str(tiny.world(tmp_path, rows=48))
    settings = ["extract.rows_per_chunk=1"]
    extract(load_config(run_file, [*settings, f"run.dir='{tmp_path / 'inline'}'"]), StopRequest())
    no_encoders = ["encoders.image={}", "encoders.text={}"]
    stores = extract(load_config(run_file, [*settings, *no_encoders]), StopRequest())
    with Client(local) as client, Cluster(client, load_config(run_file, settings)).ending() as c:
        scheduler: Any = local.scheduler
        watcher = Watcher(scheduler)
        scheduler.add_plugin(watcher)
        for name in ("image/vit", "text/bert"):
            c.fill_encoder([FeatureStore.open(store) for store in stores], name, StopRequest())
    assert len(watcher.messages) > 4 * LEAST_UNITS
    assert watcher.most <= LEAST_UNITS
    assert max(map(len, watcher.messages)) < 10_000
    assert store_digests(tmp_path / "run") == store_digests(tmp_path / "inline")


def test_the_command_sleeps_until_a_unit_has_ended(
    tmp_path: Path, local: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def wait(futures: object, **options: Any) -> None:
        ended.append(len(distributed.wait(futures, **options).done))  # or it raises TimeoutError

    monkeypatch.setattr(cluster, "wait", wait)
    config = load_config(str(tiny.world(tmp_path, rows=16)))
    no_encoders = config.model_copy(update={"encoders": EncodersConfig()})
    stores = [FeatureStore.open(store) for store in extract(no_encoders, StopRequest())]
    with Client(local) as client, Cluster(client, config).ending() as of_one_thread:
        of_one_thread.fill_encoder(stores, "image/vit", StopRequest())
    assert ended
    assert all(ended)


def test_units_that_a_lost_scheduler_cancelled_are_told_as_that(
    tmp_path: Path, local: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(futures: list[Future[Any]], **options: Any) -> object:
        for future in futures:
            future.cancel()
        return distributed.wait(futures, **options)

    monkeypatch.setattr(cluster, "wait", wait)
    config = load_config(str(tiny.world(tmp_path, rows=16)))
    with (
        Client(local) as client,
        Cluster(client, config).ending() as of_one_thread,
        pytest.raises(ClusterError, match=r"The scheduler at .* is gone\. .*what is done is kept"),
    ):
        of_one_thread.fill_encoder([], "image/vit", StopRequest())


def test_workers_that_see_all_gpus_take_one_each() -> None:
    devices = [device_settings(RunSettings(), JOB, name, 2).device for name in (0, 1, "2")]
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.parametrize(("device", "gpus"), [("auto", 0), ("auto", 1), ("cpu", 4), ("cuda:3", 4)])
def test_a_device_that_is_named_or_the_only_one_is_left_as_it_is(device: str, gpus: int) -> None:
    settings = RunSettings(device=device)
    assert device_settings(settings, JOB, 1, gpus) == settings


def test_a_worker_of_a_cluster_that_sees_one_gpu_of_its_own_takes_the_setting() -> None:
    own: ClusterJob = {**JOB, "share_gpus": False}
    assert device_settings(RunSettings(), own, "tcp://10.0.0.1:4711", 8).device == "auto"


def test_a_scheduler_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SECONDS_TO_CONNECT", 0.5)
    config = load_config(str(tiny.world(tmp_path, rows=2)))
    expected = r"no Dask scheduler at 'tcp://127\.0\.0\.1:1'.*Start one with `dask scheduler`"
    with (
        pytest.raises(ClusterError, match=expected),
        open_cluster(config, scheduler="tcp://127.0.0.1:1"),
    ):
        pass


def test_processes_that_do_not_start_are_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PRELOADED", "no.such.module")  # a worker dies at its start
    config = load_config(str(tiny.world(tmp_path, rows=2)))
    expected = "The worker processes did not start .* Lower --workers"
    with pytest.raises(ClusterError, match=expected), open_cluster(config, workers=1):
        pass


def test_of_dask_a_heartbeat_that_reaches_no_scheduler_alone_is_not_logged() -> None:
    words = "Failed to communicate with scheduler during heartbeat."
    assert words in inspect.getsource(distributed.worker)
    assert not is_no_heartbeat(logging.makeLogRecord({"msg": words}))
    assert is_no_heartbeat(logging.makeLogRecord({"msg": "Removing worker %s", "args": ("a",)}))


def test_workers_of_this_machine_and_of_a_scheduler_do_not_go_together() -> None:
    done = CliRunner().invoke(
        cli, ["extract", "demo", "--scheduler", "tcp://a:1", "--workers", "2"]
    )
    assert done.exit_code == 2
    assert "leave --workers out" in done.output


def test_what_workers_wrote_elsewhere_is_waited_for_and_then_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere() -> bool:
        return False

    with pytest.raises(Stopped):  # and not after the minutes that it may take
        cluster._wait_for(nowhere, "a.zarr: image/vit", StopRequest(signal_number=15))
    monkeypatch.setattr(cluster, "SECONDS_TO_APPEAR", 0)
    with pytest.raises(ClusterError, match=r"written a.zarr: image/vit, but this .* `run.dir`"):
        cluster._wait_for(nowhere, "a.zarr: image/vit", StopRequest())
