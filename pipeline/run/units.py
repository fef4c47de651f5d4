"""What a worker of a Dask cluster does: fills some chunks of a column, asked by name and number.

It opens the index and the store by their paths, loads the encoder unless it is the one it has,
skips what is done, and writes. So a unit may be done anywhere, in any order, and twice. Nothing is
handed over but names, numbers and words.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from typing import Any, TypedDict

import torch
from distributed import get_worker

from features.encoders.trial import try_encoder
from features.errors import SailError, refused
from features.extract import MAX_LOGGED_FAULTS, ExtractOptions, Phases, extract
from features.index import Index
from features.storage.column import encoder_of, pending_in_any
from features.store import FeatureStore
from pipeline.run.config import RunConfig, RunSettings
from pipeline.run.cpu import keep_freed_memory, usable_processors
from pipeline.run.device import ANY_GPU, prepare_device
from pipeline.run.filling import Encoder, add_columns, folder_of, load_encoder
from pipeline.run.finished import KnownEncoders
from pipeline.run.folder import filling, run_folder

SECONDS_BETWEEN_REPORTS = 1.0


class ClusterJob(TypedDict):
    """What all units of one command share."""

    id: str
    """Name of the command's run, which no other has; events and requests to stop bear it."""
    version: str
    """Version of this program that the command has."""
    recipe: dict[str, Any]
    """The resolved run file, as JSON holds it."""
    processors: int | None
    """Processors for each worker, where the command knows; those a worker may use if not."""
    share_gpus: bool
    """Whether the workers see all GPUs of the machine and take turns by their numbers."""


class UnitProgress(TypedDict):
    """What a worker tells of a unit while it is at it."""

    unit: str
    rows: int
    begins: bool


class UnitResult(TypedDict):
    """What became of a unit."""

    phases: dict[str, Any]
    """Seconds and counts, as in `features.extract.Phases`."""
    fingerprints: dict[str, dict[str, Any]]
    """Of the columns of an encoder, where they were asked for."""
    lines: list[str]
    """The first warnings, which name quarantined rows."""
    error: str | None
    """What the user can put right; the unit ended there."""


class _Process:
    """What this worker process keeps between units: one encoder at most, and who asked to stop."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        """Held by the unit at work: an encoder serves one thread."""
        self.stopped: set[str] = set()
        self.checked: tuple[str, str] | None = None
        """The encoder whose columns are in the stores and were checked against it."""
        self._key: tuple[str, str] | None = None
        self._encoder: Encoder | None = None

    def encoder(self, key: tuple[str, str], load: Callable[[], Encoder]) -> Encoder:
        """Return the encoder of a job; the one before it is let go first."""
        if self._encoder is None or self._key != key:
            self.forget()
            self._encoder, self._key = load(), key
        return self._encoder

    def forget(self) -> None:
        """Let go of the encoder and its memory."""
        if self._encoder is None:
            return
        self._encoder = self._key = self.checked = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_process = _Process()


def describe_encoder(job: ClusterJob, unit: str, name: str) -> UnitResult:
    """Load an encoder, run one image or text through it, and tell its fingerprints.

    Nothing is written.

    Args:
        job: What all units share.
        unit: The name under which this is reported.
        name: `image/<encoder>` or `text/<encoder>`.
    """
    found: dict[str, dict[str, Any]] = {}

    def work(config: RunConfig) -> Phases:
        encoder = _loaded(job, config, name)
        try_encoder(encoder)
        found.update(encoder.fingerprints)
        return Phases()

    result = _reported(job, unit, work)
    result["fingerprints"] = found
    return result


def prepare_columns(job: ClusterJob, unit: str, name: str) -> UnitResult:
    """Load an encoder, and make its columns in the store of every split.

    Args:
        job: What all units share.
        unit: The name under which this is reported.
        name: `image/<encoder>` or `text/<encoder>`.
    """

    def work(config: RunConfig) -> Phases:
        encoder = _checked(job, config, name)
        known = KnownEncoders(run_folder(config).path / "encoders.json")
        known.remember(name, config, folder_of(config, name), encoder.fingerprints)
        return Phases()

    return _reported(job, unit, work)


def fill_chunks(
    job: ClusterJob, unit: str, split: str, names: list[str], chunks: list[int]
) -> UnitResult:
    """Fill those of the chunks of some columns that are not done.

    Args:
        job: What all units share.
        unit: The name under which rows done are reported.
        split: Names index and store.
        names: Columns of one encoder that one pass fills: of an image encoder `image/<column>`
            each, of a text encoder one `text/<encoder>/<field>`.
        chunks: Numbers of the chunks.
    """

    def work(config: RunConfig) -> Phases:
        encoder = _checked(job, config, encoder_of(names[0]))
        folder = run_folder(config)
        with filling(folder.path):
            store = FeatureStore.open(folder.store(split))
            columns = [store.column(name) for name in names]
            pending = pending_in_any(columns, chunks)
            progress = _Progress(job, unit)
            progress.add(sum(map(columns[0].chunk_rows, set(chunks) - set(pending))))
            options = ExtractOptions(
                workers=config.extract.workers or job["processors"] or usable_processors(),
                should_stop=lambda: job["id"] in _process.stopped,
                on_rows=progress.add,
            )
            index = Index.open(folder.index(split))
            return extract(store, columns, index, encoder, options, pending)

    return _reported(job, unit, work)


def stop_units(job_id: str) -> None:
    """Ask the units of a job that this process has to end after the chunk at hand."""
    _process.stopped.add(job_id)


def forget_encoder() -> None:
    """Let go of the encoder, unless a unit of another command is at work with it."""
    if _process.turn.acquire(blocking=False):
        try:
            _process.forget()
        finally:
            _process.turn.release()


def device_settings(
    settings: RunSettings, job: ClusterJob, number: object, gpus: int
) -> RunSettings:
    """Return the settings with the device of this worker: its own GPU where workers share them.

    Args:
        settings: As in the recipe.
        job: What all units share.
        number: Name of the worker, a number from 0 on where the command started it.
        gpus: GPUs that this process sees.
    """
    if not job["share_gpus"] or settings.device not in ANY_GPU or gpus < 2:
        return settings
    return settings.model_copy(update={"device": f"cuda:{int(str(number)) % gpus}"})


class _Progress:
    """Tells the command now and then how many rows of a unit are done."""

    def __init__(self, job: ClusterJob, unit: str) -> None:
        self._topic = job["id"]
        self._unit = unit
        self._rows = 0
        self._last = time.monotonic()

    def add(self, rows: int) -> None:
        self._rows += rows
        if time.monotonic() - self._last > SECONDS_BETWEEN_REPORTS:
            self._last = time.monotonic()
            progress: UnitProgress = {"unit": self._unit, "rows": self._rows, "begins": False}
            get_worker().log_event(self._topic, progress)


def _reported(job: ClusterJob, unit: str, work: Callable[[RunConfig], Phases]) -> UnitResult:
    """Do some work when it is this unit's turn, and say what came of it."""
    with _process.turn, _warnings_kept() as lines:
        progress: UnitProgress = {"unit": unit, "rows": 0, "begins": True}
        get_worker().log_event(job["id"], progress)
        try:
            _check_version(job)
            phases, error = work(RunConfig.model_validate(job["recipe"])), None
        except SailError as fault:  # in words: not every exception survives being sent
            phases, error = Phases(), str(fault)
        except OSError as fault:
            phases, error = Phases(), refused(fault, "every worker")
    return {"phases": asdict(phases), "fingerprints": {}, "lines": lines, "error": error}


def _check_version(job: ClusterJob) -> None:
    version = metadata.version("sail")
    if version != job["version"]:
        raise SailError(
            f"This worker has version {version} of this program, the command has "
            f"{job['version']}. Install the same version where the workers run."
        )


@contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    """Keep the first warnings, to be logged by the command instead of here."""
    lines, logger = list[str](), logging.getLogger("features")
    handler = logging.Handler(logging.WARNING)

    def keep(record: logging.LogRecord) -> bool:
        if len(lines) < MAX_LOGGED_FAULTS:
            lines.append(record.getMessage())
        return False

    handler.addFilter(keep)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield lines
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


def _loaded(job: ClusterJob, config: RunConfig, name: str) -> Encoder:
    """Return an encoder, the one of this process if that is it."""

    def load() -> Encoder:
        return load_encoder(config, name, prepare_device(_settings(job, config)))

    return _process.encoder((job["id"], name), load)


def _checked(job: ClusterJob, config: RunConfig, name: str) -> Encoder:
    """Return an encoder whose columns are in the stores and were checked against it."""
    encoder, key = _loaded(job, config, name), (job["id"], name)
    if _process.checked != key:
        folder = run_folder(config)
        add_columns((FeatureStore.open(folder.store(split)) for split in config.extracted), encoder)
        _process.checked = key
    return encoder


def _settings(job: ClusterJob, config: RunConfig) -> RunSettings:
    """Return the settings of this worker: its device, and its threads."""
    keep_freed_memory()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    settings = device_settings(config.run, job, get_worker().name, gpus)
    if settings.threads is None and job["processors"] is not None:
        settings = settings.model_copy(update={"threads": job["processors"]})
    return settings


def dask_setup(worker: object) -> None:  # noqa: ARG001 - the name and form that Dask calls
    """Leave signals to the command that started this worker: it ends it after its chunk.

    And the words about a scheduler that is gone: at the end of a command it may be gone before the
    worker is, and Dask would log a traceback.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger("distributed.worker").addFilter(is_no_heartbeat)


def is_no_heartbeat(record: logging.LogRecord) -> bool:
    """Return whether a line of Dask is not about a heartbeat that reached no scheduler."""
    return "scheduler during heartbeat" not in record.getMessage()
