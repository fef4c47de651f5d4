"""The loop over the steps of a training: what is written, scored and saved when."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing

from torch import Tensor

from align.checkpoint import CheckpointFolder
from align.loader import Batch
from align.metrics import MetricsLog
from align.training import CHOSEN_BY, Training
from features.errors import TrainingError

SECONDS_BETWEEN_CHECKPOINTS = 60.0
SAVING_SHARE = 20.0  # at most one part in so many of the time goes into checkpoints

OnStep = Callable[[int, int, str], None]
"""Told the number of a step that was made, the steps in all, and in words how it goes."""


class Loop:
    """The loop over the steps: what is done when."""

    def __init__(
        self,
        training: Training,
        folder: CheckpointFolder,
        log: MetricsLog | None,
    ) -> None:
        """Prepare.

        Args:
            training: What changes.
            folder: Where checkpoints go.
            log: Where metrics go; only the first of several processes has one.
        """
        self.ring = training.ring
        self.training = training
        self.folder = folder
        self.log = log
        config = training.config
        self.eval_every = config.eval_every or training.loader.steps_per_epoch
        self.log_every = min(50, max(1, training.total_steps // 500))
        self.checkpoint_every = config.checkpoint_every
        self.clock = Clock()
        self.note = ""

    def run(self, should_stop: Callable[[], bool], on_step: OnStep) -> None:
        """Train until the end, or until a process is asked to stop; then the last step is saved."""
        training = self.training
        stop = False
        with closing(training.loader.batches(training.step, training.total_steps)) as batches:
            while not training.is_finished and not stop:
                batch = self.next_batch(batches)
                rate = training.rate
                loss = training.update(batch)
                self.clock.images += training.config.batch_size
                if self.is_due(self.log_every):
                    self.write_metrics(loss, rate)
                if self.is_due(self.eval_every):
                    self.evaluate()
                due = self.ring.leads and self.is_due_for_checkpoint()
                stop, save = map(bool, self.ring.greatest(should_stop(), due))
                if stop or save:
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
        if self.log is None:
            return
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
            self.note += f", held-out {CHOSEN_BY.replace('_', ' ')} {training.best_score:.3f}"

    def evaluate(self) -> None:
        """Score the held-out rows, and write that down."""
        self.check_loss()
        self.training.evaluate()
        if self.log is not None and (scores := self.training.scores):
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
        if self.ring.leads:
            snapshot = training.snapshot()
            if not all(weight.isfinite().all() for weight in snapshot.weights.values()):
                raise self.failure(training.step, "update is")
            self.folder.save(snapshot, training.state(), training.best)
            training.best = None
        self.ring.greatest()  # no process goes on, or ends, before it is on the disk
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
        keys = self.training.loader.keys(step - 1, 3)
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


class Clock:
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
