"""Stage two as a run: the recipe's store and settings in, the best checkpoint out."""

import signal
from contextlib import nullcontext
from pathlib import Path

import torch

from align.ring import Ring
from align.trainer import train
from features.errors import TrainingError
from features.store import FeatureStore
from pipeline.config import RunConfig
from pipeline.export import export_model
from pipeline.interrupt import Stopped, StopRequest
from pipeline.processes import joined_processes
from pipeline.progress import ProgressLine
from pipeline.run import RunFolder, run_folder, start_run


def align_run(config: RunConfig, stop: StopRequest) -> Path | None:
    """Train the head of a recipe on the store of its training split; return its best checkpoint.

    The best head is exported to `run.dir/model` as well. Under torchrun all processes train one
    head, and only the first returns a checkpoint.

    Raises:
        TrainingError: The store has not all the rows done that the recipe trains on.
        Stopped: A signal came, here or to another process; the last checkpoint is on disk.
    """
    with joined_processes(config.run) as (ring, device):
        folder = start_run(config) if ring.leads else run_folder(config)
        best = _train(config, folder, ring, device, stop)
    if best is None:
        if not stop():
            stop.signal_number = signal.SIGTERM  # it came to another process
        raise Stopped
    if not ring.leads:
        return None
    export_model(best, folder.model)
    return best


def _train(
    config: RunConfig, folder: RunFolder, ring: Ring, device: torch.device, stop: StopRequest
) -> Path | None:
    store = FeatureStore.open(folder.store(config.align.split))
    image, text = config.aligned_encoder("image"), config.aligned_encoder("text")
    for name in [f"image/{image}", *(f"text/{text}/{field}" for field in store.fields)]:
        if pending := store.column(name).pending():
            raise TrainingError(
                f"{store.path}/{name} has {len(pending)} chunks that are not done. A complete "
                f"column was expected. Finish it with `sail extract`."
            )
    with ProgressLine("align", None, "steps") if ring.leads else nullcontext() as line:

        def on_step(step: int, total: int, note: str) -> None:
            if line is not None:
                line.set(step, total, note)

        return train(
            store,
            config.align,
            image=image,
            text=text,
            run_dir=folder.align,
            device=device,
            seed=config.run.seed,
            should_stop=stop,
            on_step=on_step,
        )
