"""Stage two: train the head on the features of a store, from a checkpoint if there is one.

A run is a function of its settings, its seed and the store: the order of the rows and every random
number of a step depend on the seed and the step alone. So a run that was killed and resumed ends
with the same weights, bit for bit, as one that was not (on one device, with as many threads).

The processes that torch.distributed has joined train one head together: each takes its share of
every batch, and the result is that of one process but for the order in which numbers are summed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from align.checkpoint import Checkpoint, CheckpointFolder
from align.config import AlignConfig
from align.gradients import autocast_type
from align.head import build_model
from align.heldout import HeldOut
from align.loader import MIB, Loader, LoaderOptions
from align.loop import Loop, OnStep
from align.metrics import MetricsLog
from align.optimizer import build_optimizer
from align.ring import Ring
from align.selection import Columns, Selection, select_rows
from align.training import Training
from features.column import Column
from features.store import FeatureStore

ELSEWHERE = {"image", "text"}  # the settings may leave the names out; the encoders have them


def train(  # noqa: PLR0913 - the one entry of the stage
    store: FeatureStore,
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
        store: Features of the pairs; rows that are not ok are skipped.
        config: Settings.
        image: Name of the image encoder in the store.
        text: Name of the text encoder in the store.
        run_dir: Where checkpoints and metrics go, and come from.
        device: Where to train.
        seed: Of the first weights, the order and the dropout.
        should_stop: Asked after every step.
        on_step: Told after every step.

    Returns:
        The best checkpoint: that of the highest held-out recall@10 (the earliest of several), or
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
    columns = Columns.open(store, config, image, text)
    folder = CheckpointFolder(run_dir)
    described = describe(columns, config, seed)
    checkpoint = _resume(folder, described, ring)
    if checkpoint is not None and checkpoint.metadata["finished"]:
        return folder.best
    with _random_numbers(device, seed), _fast_products(config, device):
        training = _prepare(columns, config, seed=seed, device=device, described=described)
        if checkpoint is not None:
            training.restore(checkpoint)
        ring.copy_from_first(training.model.parameters())
        with _metrics_log(run_dir, training) as log:
            Loop(training, columns, folder, log).run(should_stop, on_step)
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
    columns: Columns,
    config: AlignConfig,
    *,
    seed: int,
    device: torch.device,
    described: dict[str, Any],
) -> Training:
    selection = select_rows(
        columns, holdout=config.holdout, holdout_rows=config.holdout_rows, rows=config.rows
    )
    identical = config.loss.positives == "identical"
    weights, ring = config.loss.field_weights, Ring.of_processes()
    loader = Loader(
        columns,
        selection.train,
        selection.text_ok,
        LoaderOptions(
            batch_size=config.batch_size,
            memory_bytes=config.memory_mb * MIB,
            seed=seed,
            captions_per_image=config.captions_per_image,
            field_weights=tuple(weights.get(name, 1.0) for name in columns.fields),
            with_caption_ids=identical,
            device=device,
            rank=ring.rank,
            ranks=ring.size,
        ),
    )
    model = build_model(
        config.head, config.loss, image_dim=columns.image.dim, text_dim=columns.text[0].dim
    ).to(device)
    return Training(
        config=config,
        seed=seed,
        device=device,
        loader=loader,
        heldout=(
            _held_out(columns, selection, identical=identical, device=device)
            if ring.leads
            else None
        ),
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        described=described,
        ring=ring,
    )


def _held_out(
    columns: Columns, selection: Selection, *, identical: bool, device: torch.device
) -> HeldOut | None:
    rows = selection.heldout
    if not len(rows):
        return None
    return HeldOut(columns, rows, selection.text_ok[rows], identical=identical, device=device)


def describe(columns: Columns, config: AlignConfig, seed: int) -> dict[str, Any]:
    """Return what decides the result of a training, as JSON."""

    def encoder(column: Column) -> dict[str, Any]:
        name = column.name.split("/")[1]
        return {"name": name, "dim": column.dim, "fingerprint": column.fingerprint}

    store = columns.store
    return {
        "align": config.model_dump(mode="json", exclude=ELSEWHERE),
        "fields": list(columns.fields),
        "seed": seed,
        "image": encoder(columns.image),
        "text": encoder(columns.text[0]),
        "store": {"rows": store.rows, "keys_sha256": store.keys_sha256},
    }


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
