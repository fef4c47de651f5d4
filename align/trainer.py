"""Stage two: train the head on the features of a store, from a checkpoint if there is one.

A run is a function of its settings, its seed and the store: the order of the rows and every random
number of a step depend on the seed and the step alone. So a run that was killed and resumed ends
with the same weights, bit for bit, as one that was not (on one device, with as many threads).

The processes that torch.distributed has joined train one head together: each takes its share of
every batch, and the result is that of one process but for the order in which numbers are summed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from align.checkpoint import Checkpoint, CheckpointFolder
from align.config import AlignConfig
from align.data import describe, open_columns, training_data
from align.gradients import autocast_type
from align.head import build_model
from align.loop import Loop, OnStep
from align.metrics import MetricsLog
from align.optimizer import build_optimizer
from align.ring import Ring
from align.selection import Columns, PairedStore
from align.training import Training


def train(  # noqa: PLR0913 - the one entry of the stage
    stores: Sequence[PairedStore],
    config: AlignConfig,
    *,
    image: str,
    text: str,
    run_dir: Path,
    device: torch.device,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: OnStep = lambda _step, _total, _note: None,
) -> Path | None:
    """Train to the end, or until asked to stop; return at once if that was done before.

    Args:
        stores: Features of the pairs; rows that are not ok are skipped.
        config: Settings.
        image: Name of the image encoder in the stores.
        text: Name of the text encoder in the stores.
        run_dir: Where checkpoints and metrics go, and come from.
        device: Where to train.
        seed: Of the first weights, the order and the dropout.
        should_stop: Asked after every step.
        on_step: Told after every step.

    Returns:
        The best checkpoint: that of the highest held-out mean recall (the earliest of several), or
        the last one where no row is held out. None if it was asked to stop: the last checkpoint is
        on disk, and the next call goes on from there.

    Raises:
        StoreError: A column is missing or damaged.
        TrainingError: The rows or the memory do not do for these settings, or the loss is not
            finite.
        CheckpointError: The checkpoint in `run_dir` is of another training, or damaged, or a new
            one cannot be written.
    """
    ring = Ring.of_processes()
    columns = open_columns(stores, config, image, text)
    weights = [each.weight for each in stores]
    folder = CheckpointFolder(run_dir)
    described = describe(columns, weights, config, seed)
    checkpoint = _resume(folder, described, ring)
    if checkpoint is not None and checkpoint.metadata["finished"]:
        return folder.best
    with _random_numbers(device, seed), _fast_products(config, device):
        training = _prepare(columns, weights, config, seed=seed, device=device, described=described)
        if checkpoint is not None:
            training.restore(checkpoint)
        ring.copy_from_first(training.model.parameters())
        with _metrics_log(run_dir, training) as log:
            Loop(training, folder, log).run(should_stop, on_step)
    return folder.best if training.is_finished else None


def _resume(folder: CheckpointFolder, described: dict[str, Any], ring: Ring) -> Checkpoint | None:
    """Let the first process put the folder in order before the others look at it."""
    checkpoint = folder.resume(described) if ring.leads else None
    ring.greatest()
    if not ring.leads and folder.last.exists():
        checkpoint = Checkpoint.open(folder.last)
    return checkpoint


def _metrics_log(run_dir: Path, training: Training) -> AbstractContextManager[MetricsLog | None]:
    if training.ring.leads:
        return closing(MetricsLog(run_dir, step=training.step))
    return nullcontext()


def _prepare(
    columns: Sequence[Columns],
    weights: Sequence[float],
    config: AlignConfig,
    *,
    seed: int,
    device: torch.device,
    described: dict[str, Any],
) -> Training:
    loader, heldout = training_data(columns, weights, config, seed=seed, device=device)
    first = columns[0]
    model = build_model(
        config.head, config.loss, image_dim=first.image.dim, text_dim=first.text[0].dim
    ).to(device)
    return Training(
        config=config,
        seed=seed,
        device=device,
        loader=loader,
        heldout=heldout,
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        described=described,
        ring=Ring.of_processes(),
    )


@contextmanager
def _random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch, and give the caller its random numbers back in the end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _fast_products(config: AlignConfig, device: torch.device) -> Iterator[None]:
    """Let float32 products, those of the loss, use TF32 where the heads use bfloat16."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and autocast_type(config, device) is not None:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
