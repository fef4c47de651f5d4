"""Stage two: train the head on the features of a store, from a checkpoint if there is one.

A run is a function of its settings, its seed and the store: the order of the rows and every random
number of a step depend on the seed and the step alone. So a run that was killed and resumed ends
with the same weights, bit for bit, as one that was not (on one device, with as many threads).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.checkpoint import CheckpointFolder
from align.config import AlignConfig
from align.gradients import autocast_type
from align.head import build_model
from align.heldout import HeldOut
from align.loader import MIB, Batch, Loader, LoaderOptions
from align.metrics import MetricsLog
from align.optimizer import build_optimizer
from align.selection import Columns, Selection, select_rows
from align.training import CHOSEN_BY, Training
from features.column import Column
from features.errors import TrainingError
from features.store import FeatureStore

SECONDS_BETWEEN_CHECKPOINTS = 60.0
SAVING_SHARE = 20.0  # at most one part in so many of the time goes into checkpoints
ELSEWHERE = {"image", "text"}  # the settings may leave the names out; the encoders have them

OnStep = Callable[[int, int, str], None]
"""Told the number of a step that was made, the steps in all, and in words how it goes."""


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
    columns = Columns.open(store, config, image, text)
    folder = CheckpointFolder(run_dir)
    described = describe(columns, config, seed)
    checkpoint = folder.resume(described)
    if checkpoint is not None and checkpoint.metadata["finished"]:
        return folder.best
    with _random_numbers(device, seed), _fast_products(config, device):
        training = _prepare(columns, config, seed=seed, device=device, described=described)
        if checkpoint is not None:
            training.restore(checkpoint)
        with closing(MetricsLog(run_dir, step=training.step)) as log:
            _Run(training, columns, folder, log).run(should_stop, on_step)
    return folder.best if training.is_finished else None


def _prepare(
    columns: Columns,
    config: AlignConfig,
    *,
    seed: int,
    device: torch.device,
    described: dict[str, Any],
) -> Training:
    selection = select_rows(columns, holdout=config.holdout, holdout_rows=config.holdout_rows)
    identical = config.loss.positives == "identical"
    weights = config.loss.field_weights
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
        heldout=_held_out(columns, selection, identical=identical, device=device),
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        described=described,
    )


def _held_out(
    columns: Columns, selection: Selection, *, identical: bool, device: torch.device
) -> HeldOut | None:
    rows = selection.heldout
    if not len(rows):
        return None
    return HeldOut(columns, rows, selection.text_ok[rows], identical=identical, device=device)


class _Run:
    """The loop over the steps: what is done when."""

    def __init__(
        self, training: Training, columns: Columns, folder: CheckpointFolder, log: MetricsLog
    ) -> None:
        self.training = training
        self.columns = columns
        self.folder = folder
        self.log = log
        config = training.config
        self.eval_every = config.eval_every or training.loader.steps_per_epoch
        self.log_every = min(50, max(1, training.total_steps // 500))
        self.checkpoint_every = config.checkpoint_every
        self.clock = _Clock()
        self.note = ""

    def run(self, should_stop: Callable[[], bool], on_step: OnStep) -> None:
        """Train until the end, or until asked to stop; either way the last step is saved."""
        training = self.training
        stop = False
        with closing(training.loader.batches(training.step, training.total_steps)) as batches:
            while not training.is_finished and not stop:
                batch = self.next_batch(batches)
                rate = training.rate
                loss = training.update(batch)
                self.clock.images += len(batch.rows)
                if self.is_due(self.log_every):
                    self.write_metrics(loss, rate)
                if self.is_due(self.eval_every):
                    self.evaluate()
                stop = should_stop()
                if stop or self.is_due_for_checkpoint():
                    self.save()
                on_step(training.step, training.total_steps, self.note)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, and count how long it was waited for."""
        started = time.monotonic()
        batch = next(batches)
        self.clock.waited += time.monotonic() - started
        return batch

    def write_metrics(self, loss: Tensor, rate: float) -> None:
        """Write down how the training goes."""
        training = self.training
        self.check_loss()
        value = loss.item()  # the CPU waits for the device here, and hardly anywhere else
        values = {
            "loss": value,
            "learning_rate": rate,
            "scale": training.model.log_scale.exp().item(),
            "bias": training.model.bias.item(),
            "images_per_second": round(self.clock.images / self.clock.seconds, 1),
            "wait_for_data_seconds": round(self.clock.waited, 4),
        }
        self.log.write(training.step, training.epoch, values)
        self.clock.restart()
        self.note = f"loss {value:.4g}"
        if training.best_score is not None:
            self.note += f", held-out {CHOSEN_BY} {training.best_score:.3f}"

    def evaluate(self) -> None:
        """Score the held-out rows, and write that down."""
        self.check_loss()
        self.training.evaluate()
        if scores := self.training.scores:
            values = {f"heldout/{name}": score for name, score in scores.items()}
            self.log.write(self.training.step, self.training.epoch, values)
        self.clock.restart()

    def save(self) -> None:
        """Write a checkpoint that this training can go on from.

        Raises:
            TrainingError: A weight is not finite, as after a gradient that was not.
            CheckpointError: It cannot be written.
        """
        self.check_loss()
        training, started = self.training, time.monotonic()
        snapshot = training.snapshot()
        if not all(weight.isfinite().all() for weight in snapshot.weights.values()):
            raise self.failure(training.step, "update is")
        self.folder.save(snapshot, training.state(), training.best)
        training.best = None
        self.clock.saved(time.monotonic() - started)

    def check_loss(self) -> None:
        """Refuse to go on from a loss that is not finite.

        Raises:
            TrainingError: With the step, the first keys of its batch and the last good checkpoint.
        """
        if step := self.training.failed_at:
            raise self.failure(step, "loss is")

    def failure(self, step: int, what: str) -> TrainingError:
        """Return the error that says at which step and rows numbers ceased to be finite."""
        rows = self.training.loader.order.rows(step - 1)[:3].tolist()
        keys = [str(self.columns.store.keys(row, row + 1)[0]) for row in rows]
        last = self.folder.last
        good = f"is {last.resolve()}" if last.exists() else "was not written yet"
        return TrainingError(
            f"The {what} not finite at step {step}, whose batch begins with the keys {keys}. "
            f"A number was expected. Lower align.optimizer.learning_rate, or set "
            f"align.optimizer.max_grad_norm. The last good checkpoint {good}."
        )

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is due."""
        return self.training.step % every == 0 or self.training.is_finished

    def is_due_for_checkpoint(self) -> bool:
        """Whether to save now: by the setting, or by the time since the last one."""
        if self.checkpoint_every is not None:
            return self.is_due(self.checkpoint_every)
        return self.training.is_finished or self.clock.checkpoint_is_due()


class _Clock:
    """What happened since the last line of the metrics, and when the last checkpoint was."""

    def __init__(self) -> None:
        self._saved_at = time.monotonic()
        self._between = SECONDS_BETWEEN_CHECKPOINTS
        self.restart()

    def restart(self) -> None:
        """Forget the images and the times."""
        self._started_at = time.monotonic()
        self.images = 0
        self.waited = 0.0

    @property
    def seconds(self) -> float:
        """Since the last restart."""
        return max(time.monotonic() - self._started_at, 1e-9)

    def checkpoint_is_due(self) -> bool:
        """Whether enough time has passed since the last checkpoint."""
        return time.monotonic() - self._saved_at >= self._between

    def saved(self, seconds: float) -> None:
        """Note that a checkpoint was written, and how long that took."""
        self._saved_at = time.monotonic()
        self._between = max(SECONDS_BETWEEN_CHECKPOINTS, SAVING_SHARE * seconds)
        self.restart()


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
