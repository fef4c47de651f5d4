"""Stage two as a run: the recipe's store and settings in, the best checkpoint out."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from align.processes import Ring
from align.trainer import train
from features.device.cuda import choose, is_gpu
from features.device.memory import refusing_without_memory
from features.errors import ConfigError, TrainingError
from features.storage.files import remove_leftovers
from features.store import FeatureStore
from pipeline.card import export_model
from pipeline.interrupt import Stopped, StopRequest
from pipeline.progress import ProgressLine
from pipeline.run.config import RunConfig, RunSettings
from pipeline.run.device import gpu_of_process, prepare_device
from pipeline.run.folder import (
    RunFolder,
    check_complete,
    open_store,
    run_folder,
    stage_lock,
    start_run,
)

WITH_LESS = (
    "Lower align.memory_mb, which is for features on the GPU, or align.batch_size. The last "
    "checkpoint is kept."
)
CLOSED_FORM = ("align.start='cca'", "align.head.kind='linear'", "align.steps=0")
"""Settings of `sail align --closed-form`."""


@contextmanager
def joined_processes(settings: RunSettings) -> Iterator[tuple[Ring, torch.device]]:
    """Join the processes of torchrun, if it started this one; give the ring and our device.

    On GPUs each process has its own, the one of its number on this machine. What the processes
    tell one another beside tensors of a GPU goes over gloo, so that no GPU is waited for.
    """
    device = prepare_device(settings)
    if not dist.is_torchelastic_launched():
        yield Ring(), device
        return
    backend = "gloo"
    if is_gpu(device):
        device = gpu_of_process(settings, int(os.environ["LOCAL_RANK"]))
        choose(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        ring = Ring.of_processes()
        if not ring.leads:  # the first one speaks for all
            logging.disable(logging.INFO)
        yield ring, device
    finally:
        dist.destroy_process_group()


def align_run(config: RunConfig, stop: StopRequest) -> Path | None:
    """Train the head of a recipe on the store of its training split; return its best checkpoint.

    The best head is exported to `run.dir/model` as well. Under torchrun all processes train one
    head, and only the first returns a checkpoint.

    Raises:
        ConfigError: Several splits are mixed, but one store is named for all of them.
        LockedError: Another process trains in this run folder.
        TrainingError: A store has not all the rows done that the recipe trains on.
        Stopped: A signal came, here or to another process; the last checkpoint is on disk.
    """
    config.check_trains()
    with joined_processes(config.run) as (ring, device):
        folder = run_folder(config)
        with (
            stage_lock(config, "align") if ring.leads else nullcontext(),
            refusing_without_memory(TrainingError, "The training", device, WITH_LESS),
        ):
            best = _train(config, folder, ring, device, stop)
            if best is not None and ring.leads:
                remove_leftovers(folder.path)
                export_model(best, folder.model)
    if best is None:
        if not stop():
            stop.signal_number = signal.SIGTERM  # it came to another process
        raise Stopped
    return best if ring.leads else None


def _aligned_encoder(config: RunConfig, kind: Literal["image", "text"], store: FeatureStore) -> str:
    """Return the encoder of the recipe, or of a recipe without any the only one of the store.

    Raises:
        ConfigError: There are several, or none.
    """
    if config.align.names(kind) or getattr(config.encoders, kind):
        return config.aligned_encoder(kind)
    names = dict.fromkeys(name.split("/")[1] for name in store.columns() if name.startswith(kind))
    if len(names) != 1:
        raise ConfigError(
            f"{store.path} has {len(names)} {kind} encoders ({', '.join(names) or 'none'}). One "
            f"was expected, since the recipe has none. Set align.{kind} to the name of one of them."
        )
    return next(iter(names))


def _train(
    config: RunConfig, folder: RunFolder, ring: Ring, device: torch.device, stop: StopRequest
) -> Path | None:
    mix = config.align.mix or {config.align.split: 1.0}
    stores = [open_store(config, folder, split) for split in mix]
    image, text = (_aligned_encoder(config, kind, stores[0]) for kind in ("image", "text"))
    for each in stores:
        check_complete(each, config, image, text)
    with ProgressLine("align", None, "steps") if ring.leads else nullcontext() as line:

        def should_stop() -> bool:
            # After the first step, since settings that were refused replace no others; and before
            # the first checkpoint, which is read by them.
            if line is not None and line.total is None:
                start_run(config, "align")
            return stop()

        def on_step(step: int, total: int, note: str) -> None:
            if line is not None:
                line.set(step, total, note)

        best = train(
            stores,
            config.align,
            weights=list(mix.values()),
            image=image,
            text=text,
            run_dir=folder.align,
            device=device,
            seed=config.run.seed,
            moments=folder.moments,
            should_stop=should_stop,
            on_step=on_step,
        )
    if best is not None and ring.leads:
        start_run(config, "align")
    return best
