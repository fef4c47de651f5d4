"""Finds the Dask cluster that stage one runs on, or starts one of processes on this machine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import Client, LocalCluster

from features.errors import ClusterError
from pipeline.config import RunConfig
from pipeline.extraction.cluster import MOST_DEATHS, Cluster
from pipeline.processors import usable_processors

SECONDS_TO_CONNECT = 30
PRELOADED = "pipeline.extraction.units"
SETTINGS = {
    "distributed.scheduler.allowed-failures": MOST_DEATHS - 1,
    # Else a worker that was lost is given up while it is still being started again.
    "distributed.deploy.lost-worker-timeout": "1 hour",
}
"""Of Dask, for workers of this machine."""


@contextmanager
def open_cluster(
    config: RunConfig, *, scheduler: str | None = None, workers: int | None = None
) -> Iterator[Cluster]:
    """Connect to a Dask cluster, or start one of processes on this machine and end it after.

    Args:
        config: Settings of the run.
        scheduler: Address of a scheduler, or the path of its scheduler file.
        workers: Processes to start, if no scheduler is given.

    Raises:
        ClusterError: The scheduler does not answer, or the processes do not start.
    """
    logging.getLogger("distributed").setLevel(logging.WARNING)
    if scheduler is not None:
        with _connected(scheduler) as client, Cluster(client, config).ending() as cluster:
            yield cluster
        return
    count = workers or 1
    processors = max(1, usable_processors() // count)
    with (
        dask.config.set(SETTINGS),
        _started(count) as local,
        Client(local) as client,
        Cluster(client, config, processors=processors).ending() as cluster,
    ):
        try:
            yield cluster
        finally:  # to end, an idle process may need more than the seconds after which it warns
            logging.getLogger("distributed.nanny").setLevel(logging.ERROR)


def _started(count: int) -> LocalCluster:
    """Start worker processes on this machine."""
    try:
        return LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            memory_limit=None,  # what is ahead is bounded by settings, as it is inline
            dashboard_address="127.0.0.1:0",
            preload=[PRELOADED],
        )
    except (RuntimeError, OSError, TimeoutError) as error:
        raise ClusterError(
            f"The worker processes did not start ({error}). {count} of them, with room in memory "
            f"to load an encoder each, were expected. Lower --workers, or leave it out."
        ) from error


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    place = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = Client(**place, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"There is no Dask scheduler at {scheduler!r} ({error}). The address of one that runs, "
            f"such as tcp://10.0.0.1:8786, or the path of its scheduler file was expected. Start "
            f"one with `dask scheduler`, and give the address it logs."
        ) from error
    with client:
        yield client
