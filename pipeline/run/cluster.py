"""Stage one on a Dask cluster: hands out units of whole chunks, a few for each worker at a time.

The stores are the only record of what is done. A worker that is lost loses the chunk it was at; its
unit is done again by another, which skips what is there. Nothing but names and numbers is sent.
"""

import functools
import itertools
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, wait

from features.errors import ClusterError, SailError
from features.extract import MAX_LOGGED_FAULTS, Phases
from features.storage.column import Column, pending_in_any
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run import units
from pipeline.run.config import RunConfig
from pipeline.run.cpu import usable_processors
from pipeline.run.filling import finish_columns, progress_line
from pipeline.run.finished import columns_of

logger = logging.getLogger(__name__)
UNITS_PER_WORKER = 2
"""One at work, one that waits on the worker, so that it never stands idle between two."""
LEAST_UNITS = 8
"""Handed out even if there is no worker yet, so that a cluster that grows by demand sees some."""
ROWS_PER_UNIT = 131_072
"""At most; minutes of work, so that opening a store or losing a worker does not count."""
UNITS_LEFT_PER_WORKER = 4
"""A unit is at most this part of what each worker still has before it."""
MOST_DEATHS = 3
"""Workers that may be lost while they are at one unit; then it ends the run."""
SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_BETWEEN_CALLS = 30
"""How often it is said that there are no workers."""
SECONDS_TO_APPEAR = 90
"""How long a shared file system may take to show what another machine has written."""
SECONDS_TO_CONNECT = 30
PRELOADED = "pipeline.run.units"
SETTINGS = {
    "distributed.scheduler.allowed-failures": MOST_DEATHS - 1,
    # Else a worker that was lost is given up while it is still being started again.
    "distributed.deploy.lost-worker-timeout": "1 hour",
}
"""Of Dask, for workers of this machine."""


def cut_into_units(
    chunks: Sequence[int], *, most: int, num_workers: Callable[[], int]
) -> Iterator[list[int]]:
    """Cut chunks into units: large ones first, and smaller ones towards the end.

    So few are needed for any number of rows, and yet all workers end at about the same time.

    Args:
        chunks: What is to be done, in order.
        most: Chunks of a unit.
        num_workers: Asked before each unit, since workers come and go.
    """
    start = 0
    while start < len(chunks):
        share = (len(chunks) - start) // (UNITS_LEFT_PER_WORKER * max(1, num_workers()))
        unit = list(chunks[start : start + min(max(share, 1), most)])
        start += len(unit)
        yield unit


@dataclass(frozen=True)
class _Unit:
    """A call of a function of `pipeline.run.units` by a worker."""

    name: str
    words: str
    """What it does, for messages."""
    rows: int
    function: Callable[..., units.UnitResult]
    arguments: tuple[Any, ...]
    """Those behind the job and the name."""


@dataclass
class _InFlight:
    """The tasks handed out, and how many rows are done."""

    on_rows: Callable[[int], None]
    tasks: dict[Future[units.UnitResult], _Unit] = field(default_factory=dict)
    phases: Phases = field(default_factory=Phases)
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the encoders that were loaded."""
    lines: int = 0
    """Warnings that were logged."""
    done: int = 0
    reported: int = 0
    begun: Counter[str] = field(default_factory=Counter)
    """How many workers have begun each task."""
    within: dict[str, int] = field(default_factory=dict)
    """Rows done of each task at work."""

    def hear(self, event: tuple[float, units.UnitProgress]) -> None:
        """Note the progress that a worker sends; called by a thread of the client."""
        _, progress = event
        self.begun[progress["unit"]] += progress["begins"]
        self.within[progress["unit"]] = progress["rows"]

    def report(self) -> None:
        """Report the rows done; what a lost worker had done is not taken back."""
        names = [task.name for task in self.tasks.values()]
        rows = self.done + sum(self.within.get(name, 0) for name in names)
        if rows > self.reported:
            self.on_rows(rows - self.reported)
            self.reported = rows


class Cluster:
    """Fills columns with the workers of a Dask cluster."""

    def __init__(self, client: Client, config: RunConfig, *, processors: int | None = None) -> None:
        self._client = client
        self._config = config
        self._address = client.scheduler_info()["address"]
        self._next_call = time.monotonic() + SECONDS_BETWEEN_CALLS
        self._job: units.ClusterJob = {
            "id": f"sail-{uuid.uuid4().hex[:12]}",
            "version": metadata.version("sail"),
            "recipe": _absolute(config).model_dump(mode="json"),
            "processors": processors,
            "share_gpus": processors is not None,
        }
        self._say_who_is_there()

    @contextmanager
    def ending(self) -> Iterator["Cluster"]:
        """Let the workers forget the encoder in the end."""
        try:
            yield self
        finally:
            with suppress(OSError):  # the scheduler is gone, which is reported already
                self._on_workers(units.forget_encoder)

    def fingerprints(self, name: str, stop: StopRequest) -> dict[str, dict[str, Any]]:
        """Let a worker load an encoder, and return the fingerprints of its columns.

        Args:
            name: `image/<encoder>` or `text/<encoder>`.
            stop: Whether a signal came.

        Raises:
            Stopped: A signal came.
            SailError: It cannot be loaded.
            ClusterError: It took down several workers, or the scheduler is gone.
        """
        describe = _Unit(
            name=f"describe {name}-{self._job['id']}",
            words=f"Loading the encoder {name}",
            rows=0,
            function=units.describe_encoder,
            arguments=(name,),
        )
        done = self._run(iter([describe]), stop, lambda _: None)
        stop.check()
        return done.fingerprints

    def fill_encoder(self, stores: list[FeatureStore], name: str, stop: StopRequest) -> None:
        """Fill the columns of an encoder in every store.

        Args:
            stores: The store of every split.
            name: `image/<encoder>` or `text/<encoder>`.
            stop: Whether a signal came.

        Raises:
            Stopped: A signal came; what is done is on disk.
            SailError: A unit failed for a reason that the user can put right.
            ClusterError: A unit took down several workers, or the scheduler is gone.
            SourceError: More rows are quarantined than the recipe allows.
        """
        prepare = _Unit(
            name=f"load {name}-{self._job['id']}",
            words=f"Loading the encoder {name}",
            rows=0,
            function=units.prepare_columns,
            arguments=(name,),
        )
        self._run(iter([prepare]), stop, lambda _: None)
        stop.check()
        for store in stores:
            for names in columns_of(self._config, store, name):
                is_there = functools.partial(_has_columns, store, names)
                _wait_for(is_there, f"{store.path}: {', '.join(names)}", stop)
                columns, phases = [store.column(each) for each in names], None
                if pending := pending_in_any(columns):
                    with progress_line(store, columns, pending) as line:
                        tasks = self._units(store, columns, pending)
                        phases = self._run(tasks, stop, line.advance).phases
                        if not stop():
                            are_done = functools.partial(_are_done, columns, pending)
                            _wait_for(are_done, f"{store.path}: {', '.join(names)}", stop)
                finish_columns(self._config, store, columns, phases, stop)

    def _units(
        self, store: FeatureStore, columns: Sequence[Column], pending: list[int]
    ) -> Iterator[_Unit]:
        split, names = store.path.stem, [column.name for column in columns]
        most = max(1, ROWS_PER_UNIT // store.rows_per_chunk)
        for chunks in cut_into_units(pending, most=most, num_workers=self._num_workers):
            place = f"chunks {chunks[0]} to {chunks[-1]} of {split} {', '.join(names)}"
            yield _Unit(
                # Units of one prefix are alike to Dask, so it keeps them until a worker is free.
                name=f"{', '.join(names)}-{place}-{self._job['id']}",
                words=f"The unit of {place}",
                rows=sum(map(columns[0].chunk_rows, chunks)),
                function=units.fill_chunks,
                arguments=(split, names, chunks),
            )

    def _run(
        self, tasks: Iterator[_Unit], stop: StopRequest, on_rows: Callable[[int], None]
    ) -> _InFlight:
        """Have tasks done, a bounded number at a time, until all are or a signal comes."""
        in_flight = _InFlight(on_rows)
        self._client.subscribe_topic(self._job["id"], in_flight.hear)
        try:
            try:
                while not stop():
                    most = max(LEAST_UNITS, UNITS_PER_WORKER * self._num_workers())
                    for task in itertools.islice(tasks, max(0, most - len(in_flight.tasks))):
                        self._submit(task, in_flight)
                    if not in_flight.tasks:
                        break
                    for future in self._finished(in_flight):
                        self._take(future, in_flight)
                    in_flight.report()
            finally:
                self._end(in_flight)
        except (OSError, CancelledError) as error:  # the client's; those of workers come as words
            raise self._scheduler_gone() from error
        return in_flight

    def _submit(self, task: _Unit, in_flight: _InFlight) -> None:
        # A key of its own each time: Dask remembers how often one has failed.
        key = f"{task.name}-{uuid.uuid4().hex[:12]}"
        future = self._client.submit(
            task.function, self._job, task.name, *task.arguments, key=key, pure=False
        )
        in_flight.tasks[future] = task

    def _finished(self, in_flight: _InFlight) -> list[Future[units.UnitResult]]:
        try:
            wait(
                list(in_flight.tasks), timeout=SECONDS_BETWEEN_LOOKS, return_when="FIRST_COMPLETED"
            )
        except TimeoutError:
            return []
        return [future for future in in_flight.tasks if future.done()]

    def _take(self, future: Future[units.UnitResult], in_flight: _InFlight) -> None:
        """Count in what a task has done, or raise what went wrong."""
        task = in_flight.tasks.pop(future)
        if future.status in ("cancelled", "lost"):
            raise self._scheduler_gone()
        try:
            report = future.result()
        except KilledWorker as error:
            self._take_death(task, error, in_flight)
            return
        in_flight.phases.add(Phases(**report["phases"]))
        in_flight.fingerprints |= report["fingerprints"]
        in_flight.done += task.rows
        for line in report["lines"][: MAX_LOGGED_FAULTS - in_flight.lines]:
            logger.warning("%s", line)
            in_flight.lines += 1
        if report["error"] is not None:
            raise SailError(report["error"])

    def _take_death(self, task: _Unit, error: KilledWorker, in_flight: _InFlight) -> None:
        """Hand out a task again, unless it was being done on every worker that was lost with it.

        Dask counts also what only waited on a lost worker: where machines are taken away often,
        that says nothing of the task.
        """
        if (deaths := in_flight.begun[task.name]) < MOST_DEATHS:
            self._submit(task, in_flight)
            return
        raise ClusterError(
            f"{task.words} ended {deaths} workers, one after the other; the last was "
            f"{error.last_worker.address}. Most often memory runs out: see the workers' logs; "
            f"lower `batch_size` or `tokens_per_batch` of the encoder, then run the same command "
            f"again: what is done is kept."
        ) from error

    def _end(self, in_flight: _InFlight) -> None:
        """Ask what is under way to end after its chunk, and wait until it has."""
        while in_flight.tasks:
            if not self._num_workers():
                self._client.cancel(list(in_flight.tasks))
                return
            self._on_workers(units.stop_units, self._job["id"])
            for future in self._finished(in_flight):
                words = in_flight.tasks[future].words
                if future.status == "error":
                    del in_flight.tasks[future]
                    logger.warning("%s failed as well: %r", words, future.exception())
                    continue
                try:
                    self._take(future, in_flight)
                except SailError as error:
                    logger.warning("%s failed as well: %s", words, error)

    def _on_workers(self, function: Callable[..., None], *arguments: str) -> None:
        self._client.run(function, *arguments, on_error="ignore")

    def _num_workers(self) -> int:
        count, now = len(self._client.nthreads()), time.monotonic()
        if not count and now > self._next_call:
            logger.warning("no worker is there; waiting for one to join %s", self._address)
        if count or now > self._next_call:
            self._next_call = now + SECONDS_BETWEEN_CALLS
        return count

    def _scheduler_gone(self) -> ClusterError:
        return ClusterError(
            f"The scheduler at {self._address} is gone. Start it again and call the same command: "
            f"what is done is kept."
        )

    def _say_who_is_there(self) -> None:
        threads = self._client.nthreads().values()
        logger.info("%d workers; dashboard at %s", len(threads), self._client.dashboard_link)
        if any(count > 1 for count in threads):
            logger.warning(
                "some workers have several threads, but a worker does one unit at a time: start "
                "one worker per GPU, with `--nthreads 1`"
            )


def _absolute(config: RunConfig) -> RunConfig:
    """Return the settings with paths that do not depend on the folder of the command."""
    run = config.run.model_copy(update={"dir": config.run.dir.absolute()})
    place = config.extract.store
    if isinstance(place, Path):
        place = place.absolute()
    extract = config.extract.model_copy(update={"store": place})
    return config.model_copy(update={"run": run, "extract": extract})


def _are_done(columns: Sequence[Column], chunks: Sequence[int]) -> bool:
    return not pending_in_any(columns, chunks)


def _has_columns(store: FeatureStore, names: Sequence[str]) -> bool:
    return set(names) <= set(store.columns())


def _wait_for(is_there: Callable[[], bool], place: str, stop: StopRequest) -> None:
    """Wait until this machine sees what a worker has written.

    Raises:
        Stopped: A signal came before it appeared.
        ClusterError: It does not appear: the workers write to another disk.
    """
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not is_there():
        stop.check()
        if time.monotonic() > deadline:
            raise ClusterError(
                f"The workers have written {place}, but this machine does not see it. Set "
                f"`run.dir` to a place that all share, on a shared file system or an object store."
            )
        time.sleep(1)


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
            f"The worker processes did not start ({error}). Each of the {count} needs memory for "
            f"an encoder. Lower --workers, or leave it out."
        ) from error


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    place = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = Client(**place, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"There is no Dask scheduler at {scheduler!r} ({error}). Start one with `dask "
            f"scheduler`, and give the address it logs, such as tcp://10.0.0.1:8786, or the path "
            f"of its scheduler file."
        ) from error
    with client:
        yield client
