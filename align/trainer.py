"""Stage two: train the head on the features of a store, from a checkpoint if there is one.

A run is a function of its settings, its seed and the store: the order of the rows and every random
number of a step depend on the seed and the step alone. So a run that was killed and resumed ends
with the same weights, bit for bit, as one that was not (on one device, with as many threads).

The processes that torch.distributed has joined train one head together: each takes its share of
every batch, and the result is that of one process but for the order in which numbers are summed.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from align.checkpoint import (
    EXPECTED,
    STATE,
    Checkpoint,
    CheckpointFolder,
    Snapshot,
    build_described,
    load_weights,
)
from align.columns import describe, open_columns
from align.config import AlignConfig
from align.heads import AlignmentModel
from align.heldout import HeldOut, standard_error
from align.loader import Batch, Loader
from align.loss import ALONE
from align.optimizer import (
    Gradients,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from align.processes import Ring
from align.training_rows import TrainingRows
from features.device.cuda import is_gpu
from features.device.memory import one_memory_error
from features.errors import TrainingError
from features.storage.files import write
from features.storage.reading import read_json_lines, reading
from features.storage.synchronise import make_folder, synchronise
from features.store import FeatureStore

logger = logging.getLogger(__name__)
SHOWN = "mean_recall"
CHOSEN_BY = "lowest"  # in the state: log-ranks of the rows at the step where their mean was lowest
FEWEST_ROWS = 50
"""Fewer held-out rows than this do not choose a step: the last one is the result."""
WEIGHTS = "weights"  # in the state: those that are trained, where an average of them is the result
SECONDS_BETWEEN_CHECKPOINTS = 60.0
WORTH_TELLING, MUCH_WAITING = 10.0, 0.1
"""Seconds of a training, and the share of them that it waited, from which it is told."""
SAVING_SHARE = 20.0  # at most one part in so many of the time goes into checkpoints

OnStep = Callable[[int, int, str], None]
"""Is given the number of a step that was made, the steps in all, and a note on how it goes."""


class MetricsLog:
    """One JSON object per line, with units in the names; the numbers go to TensorBoard as well.

    A resumed run cuts the file back to the step it goes on from, so that in the end every step is
    there once.
    """

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._started_at, self._waited = time.monotonic(), 0.0
        make_folder(run_dir)
        _cut_back(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        synchronise(run_dir)
        self._excepthook, threading.excepthook = threading.excepthook, self._tell_of_thread
        try:
            self._board = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=step + 1 if step else None
            )
        except BaseException:
            threading.excepthook = self._excepthook
            raise

    def write(self, training: "Training", values: dict[str, float]) -> None:
        """Add a line with what was measured after the last update, if anything was."""
        if not values:
            return
        self._waited += values.get("wait_for_data_seconds", 0.0)
        step = training.step
        line = {"step": step, "epoch": round(training.epoch, 4), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            name = name if "/" in name else f"train/{name}"
            self._board.add_scalar(name, value, step)

    def synchronise(self) -> None:
        """See every line on the disk, before a checkpoint of the same step."""
        synchronise(self.path)

    def close(self) -> None:
        """Write what is left, and say so where the training waited much for its data."""
        seconds = time.monotonic() - self._started_at
        if seconds > WORTH_TELLING and self._waited > MUCH_WAITING * seconds:
            logger.info(
                "the training waited for its data %.0f %% of %.0f s. Raise align.memory_mb (of a "
                "GPU also align.host_memory_mb), put the store on a faster disk, or make it int8.",
                100 * self._waited / seconds,
                seconds,
            )
        try:
            self._file.close()
            self._board.close()
        finally:
            threading.excepthook = self._excepthook

    def _tell_of_thread(self, error: threading.ExceptHookArgs) -> None:
        """Leave out a thread of TensorBoard: the next number handed over raises its error again."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._excepthook(error)


def _cut_back(path: Path, step: int) -> None:
    """Keep the lines up to a step; a line cut off by a kill is dropped."""
    if not path.is_file():
        return
    lines, damaged = read_json_lines(path)
    steps = [line.get("step") for line in lines]
    kept = [
        line
        for line, at in zip(lines, steps, strict=True)
        if isinstance(at, int | float) and at <= step
    ]
    if damaged:
        logger.warning("%s had %d lines that were damaged: they are left out", path, damaged)
    write(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


class Meter:
    """Counts images, and the time that they took, since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget the images and the times."""
        self._started_at = time.monotonic()
        self.images = 0
        self.waited = 0.0
        """Seconds that were spent in `waiting`."""

    @property
    def seconds(self) -> float:
        """Since the last restart."""
        return max(time.monotonic() - self._started_at, 1e-9)

    @property
    def images_per_second(self) -> float:
        """Images by the time since the last restart."""
        return self.images / self.seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure how long something is waited for."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started


class CheckpointTimer:
    """Says when to write a checkpoint: every so many steps, or by the time since the last one.

    If no number of steps is given, that is once a minute, or later where writing takes long.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._saved_at = time.monotonic()
        self._between = SECONDS_BETWEEN_CHECKPOINTS

    def is_due(self, training: "Training") -> bool:
        """Whether to write one now; always after the last step."""
        if self._every is not None:
            return training.is_due(self._every)
        return training.is_finished or time.monotonic() - self._saved_at >= self._between

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long it takes to write a checkpoint."""
        started = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._between = max(SECONDS_BETWEEN_CHECKPOINTS, SAVING_SHARE * (self._saved_at - started))


@dataclass
class Training:
    """Everything that goes into a checkpoint, and what is needed to change it."""

    config: AlignConfig
    seed: int
    device: torch.device
    loader: Loader
    heldout: HeldOut | None
    """Only the first of several processes has it."""
    model: AlignmentModel
    optimizer: Optimizer
    described: dict[str, Any]
    """What checkpoints say that this training was given."""
    folder: CheckpointFolder
    ring: Ring = ALONE
    """The processes that train together."""
    step: int = 0
    """Updates made."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores on the held-out rows, if they were taken at this step."""
    best_step: int = 0
    best_score: float | None = None
    best: Snapshot | None = None
    """The best weights, while they are not on disk."""
    is_whole: bool = True
    """Whether no update is half made."""
    lowest: Tensor | None = None
    """`HeldOut.log_ranks` at the step at which their mean was lowest."""
    scores_since_best: int = 0
    """How many times in a row the held-out rows were scored without a lower mean."""

    def __post_init__(self) -> None:
        per_epoch = self.loader.steps_per_epoch
        steps = self.config.steps
        self.total_steps = max(1, round(self.config.epochs * per_epoch)) if steps is None else steps
        self.gradients = Gradients(
            self.model,
            self.config,
            self.loader.fields,
            seed=self.seed,
            device=self.device,
            ring=self.ring,
        )
        # Torch's AveragedModel counts on the device, and waits for it in every update.
        self._average = None if self.config.ema is None else deepcopy(self.model)
        if self.config.compile and is_gpu(self.device):
            self.model.image_head.compile()
            self.model.text_head.compile()
        # Kept on the device: to look at every loss would make the CPU wait for it.
        self._failed_at = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def epoch(self) -> float:
        """Passes over the training rows that were made."""
        return self.step / self.loader.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        """Whether every update was made, or the held-out scores rise no more."""
        patience = self.config.patience
        stale = patience is not None and self.scores_since_best >= patience
        return stale or self.step >= self.total_steps

    @property
    def result(self) -> AlignmentModel:
        """What is scored and saved: the model, or the average of its weights."""
        return self.model if self._average is None else self._average

    @property
    def rate(self) -> float:
        """Learning rate of the next update."""
        return learning_rate(self.step, self.total_steps, self.config.optimizer)

    def is_due(self, every: int) -> bool:
        """Whether to do something now that is done every so many steps, and at the end."""
        return self.step % every == 0 or self.is_finished

    def update(self, batch: Batch) -> Tensor:
        """Make one update, without waiting for the device; return the loss before it."""
        loss = self.gradients.backward(batch, self.step)
        if (norm := self.config.optimizer.max_grad_norm) is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        set_learning_rate(self.optimizer, self.rate)
        self.is_whole = False
        self.optimizer.step()
        self.model.clamp_scale()
        self._update_average()
        self.step += 1
        self.is_whole = True
        self.scores = {}
        self._failed_at += self.step * (~loss.isfinite() & (self._failed_at == 0))
        return loss

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None or self.config.ema is None:
            return
        averages: list[Tensor] = list(self._average.parameters())
        weights: list[Tensor] = list(self.model.parameters())
        share = 1 - self.config.ema if self.step else 1.0  # the first one is taken as it is
        torch._foreach_lerp_(averages, weights, share)

    def check_loss(self) -> None:
        """Wait for the device, and refuse to go on from a loss that is not finite.

        Raises:
            TrainingError: With the step, the first keys of its batch and the last good checkpoint.
        """
        if step := int(self._failed_at.item()):
            raise self._not_finite("loss", step)

    def numbers(self, loss: Tensor) -> dict[str, float]:
        """Wait for the device, once, for the loss, the scale and the bias; see `check_loss`."""
        model = self.model
        each = (self._failed_at, loss, model.log_scale.detach().exp(), model.bias.detach())
        step, *found = torch.stack([number.double() for number in each]).tolist()
        if step:
            raise self._not_finite("loss", int(step))
        return dict(zip(("loss", "scale", "bias"), found, strict=True))

    def _not_finite(self, what: str, step: int) -> TrainingError:
        keys = self.loader.keys(step - 1, 3)
        last = self.folder.last
        good = f"is {last.resolve()}" if last.exists() else "was not written yet"
        return TrainingError(
            f"The {what} is not finite at step {step}, whose batch begins with the keys {keys}. "
            f"A number was expected. Lower align.optimizer.learning_rate, or set "
            f"align.optimizer.max_grad_norm. The last good checkpoint {good}."
        )

    def evaluate(self) -> None:
        """Score the held-out rows, and keep a copy of the weights if they are the best so far.

        The best are the last ones that are not worse than those of the lowest mean log-rank by more
        than one standard error of the difference, row by row. Where fewer than `FEWEST_ROWS` are
        held out, no step is chosen: the last one is.

        Raises:
            TrainingError: The loss is not finite; see `check_loss`.
        """
        self.check_loss()
        scores: dict[str, float] = {}
        if self.heldout is not None:
            with self.gradients.autocast():
                found = self.heldout.ranks(self.result)
            scores = self.heldout.scores(found)
            scores |= self._compare(self.heldout.log_ranks(found))
        self.scores = self.ring.from_first(scores)
        if not self.scores:
            return
        self.scores_since_best = 0 if self.scores.pop("is_lowest") else self.scores_since_best + 1
        if self.scores.pop("is_best"):
            self.best_step, self.best_score = self.step, self.scores[SHOWN]
            self.best = self.snapshot() if self.ring.leads else None

    def _compare(self, log_ranks: Tensor) -> dict[str, float]:
        """Say whether held-out rows have their lowest mean log-rank, and whether to keep the step.

        Reference:
            The rule of one standard error: Breiman et al. 1984, Classification and Regression
            Trees, section 3.4.3.
        """
        is_enough = len(log_ranks) >= FEWEST_ROWS
        if self.lowest is None or log_ranks.mean() < self.lowest.mean():
            self.lowest = log_ranks
            return {"is_lowest": 1.0, "is_best": float(is_enough)}
        worse = log_ranks - self.lowest
        is_as_good = worse.mean().item() <= standard_error(worse)
        return {"is_lowest": 0.0, "is_best": float(is_enough and is_as_good)}

    def save(self, log: MetricsLog | None) -> None:
        """Write a checkpoint that this training can go on from; all processes wait for it.

        Args:
            log: Of the first of several processes; its lines are on the disk before.

        Raises:
            TrainingError: A weight is not finite, as after a gradient that was not.
            CheckpointError: It cannot be written.
        """
        self.check_loss()
        if log is not None:
            log.synchronise()
            snapshot = self.snapshot()
            if not all(weight.isfinite().all() for weight in snapshot.weights.values()):
                raise self._not_finite("update", self.step)
            self.folder.save(snapshot, self.state(), self.best)
            self.best = None
        self.ring.greatest()  # no process goes on, or ends, before it is on the disk

    def snapshot(self) -> Snapshot:
        """Copy the weights to the host, with what config.json is to say about them."""
        weights = {
            name: tensor.detach().cpu().clone() for name, tensor in self.result.state_dict().items()
        }
        metadata = {
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": self.epoch,
            "finished": self.is_finished,
            "heldout": self.scores,
            "best_step": self.step if self.best_score is None else self.best_step,
            "best_score": self.best_score,
            "scores_since_best": self.scores_since_best,
            "run": self.described,
        }
        return Snapshot(self.step, weights, metadata)

    def state(self) -> dict[str, Tensor]:
        """Gather on the host what else the next update depends on, by name.

        That is the optimizer's state as `<number of the weight>/<name>` and, where the result is an
        average of the weights, the weights themselves as `weights/<name>`; and the log-ranks that
        later steps are compared with.
        """
        tensors = {
            f"{number}/{name}": tensor
            for number, values in self.optimizer.state_dict()["state"].items()
            for name, tensor in values.items()
        }
        if self._average is not None:
            weights = self.model.state_dict().items()
            tensors |= {f"{WEIGHTS}/{name}": tensor for name, tensor in weights}
        if self.lowest is not None:
            tensors[CHOSEN_BY] = self.lowest
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was made.

        There is no state of the loader in it: the order of the rows and every random number are
        functions of the seed and the step.

        Raises:
            CheckpointError: One of its files is damaged.
        """
        load_weights(self.result, checkpoint)
        tensors = checkpoint.tensors(STATE)
        with reading(checkpoint.path / STATE, EXPECTED):
            self.lowest = tensors.pop(CHOSEN_BY, None)
            state: dict[str, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                number, name = key.split("/")
                state.setdefault(number, {})[name] = tensor
            if self._average is not None:
                self.model.load_state_dict(state.pop(WEIGHTS))
            self.optimizer.load_state_dict(
                {
                    "state": {int(number): values for number, values in state.items()},
                    "param_groups": self.optimizer.state_dict()["param_groups"],
                }
            )
        self.step = checkpoint.step
        self.scores = checkpoint.heldout
        self.best_step = checkpoint.metadata["best_step"]
        self.best_score = checkpoint.metadata["best_score"]
        self.scores_since_best = checkpoint.metadata["scores_since_best"]
        logger.info("going on from step %d of %d", self.step, self.total_steps)


def _run_steps(
    training: Training, log: MetricsLog | None, should_stop: Callable[[], bool], on_step: OnStep
) -> None:
    """Train until the end, or until a process is asked to stop; then the last step is saved."""
    config, loader, ring = training.config, training.loader, training.ring
    log_every = min(50, max(1, training.total_steps // 500))
    eval_every = config.eval_every or loader.steps_per_epoch
    meter, timer = Meter(), CheckpointTimer(config.checkpoint_every)
    note, stop = "", False
    with closing(loader.batches(training.step, training.total_steps)) as batches:
        while not training.is_finished and not stop:
            with meter.waiting():
                batch = next(batches)
            rate = training.rate
            loss = training.update(batch)
            meter.images += config.batch_size
            if training.is_due(log_every):
                numbers = training.numbers(loss)
                if log is not None:
                    note = _log_update(log, training, numbers, rate, meter)
            if training.is_due(eval_every):
                training.evaluate()
                if log is not None:
                    log.write(training, {f"heldout/{k}": v for k, v in training.scores.items()})
                meter.restart()
            due = ring.leads and timer.is_due(training)
            stop, save = map(bool, ring.greatest(should_stop(), due))
            if stop or save:
                with timer.saving():
                    training.save(log)
                meter.restart()
            on_step(training.step, training.total_steps, note)


@contextmanager
def _keeping_steps(training: Training, log: MetricsLog | None) -> Iterator[None]:
    """Save what was trained where the device runs out of memory, and no update is half made."""
    try:
        with one_memory_error():
            yield
    except (TrainingError, torch.OutOfMemoryError) as error:
        is_memory = any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__cause__))
        is_alone = training.ring.size == 1  # the others would not come to save
        if is_memory and is_alone and training.step and training.is_whole:
            training.save(log)
        raise


def _log_update(
    log: MetricsLog, training: Training, numbers: dict[str, float], rate: float, meter: Meter
) -> str:
    """Write down how the training goes, and say it in a few words."""
    values = {
        **numbers,
        "learning_rate": rate,
        "images_per_second": round(meter.images_per_second, 1),
        "wait_for_data_seconds": round(meter.waited, 4),
    }
    log.write(training, values)
    note = f"loss {numbers['loss']:.4g}"
    if (waited := meter.waited / meter.seconds) >= 0.01:
        note += f", waits for data {waited:.0%}"
    meter.restart()
    if training.best_score is not None:
        note += f", best held-out {SHOWN.replace('_', ' ')} {training.best_score:.3f}"
    return note


def train(  # noqa: PLR0913 - the one entry of the stage
    stores: Sequence[FeatureStore],
    config: AlignConfig,
    *,
    weights: Sequence[float] = (1.0,),
    image: str,
    text: str,
    run_dir: Path,
    device: torch.device,
    seed: int,
    moments: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: OnStep = lambda _step, _total, _note: None,
) -> Path | None:
    """Train to the end, or until asked to stop; return at once if that was done before.

    Args:
        stores: Features of the pairs; rows that are not ok are skipped.
        config: Settings.
        weights: Share of each batch that comes from each store, in proportion.
        image: Name of the image encoder in the stores.
        text: Name of the text encoder in the stores.
        run_dir: Where checkpoints and metrics go, and come from.
        device: Where to train.
        seed: Of the first weights, the order and the dropout.
        moments: Folder for the moments of the features; `run_dir`/moments if not given.
        should_stop: Called after every step.
        on_step: Called after every step.

    Returns:
        The best checkpoint (see `Training.evaluate`), or the last one where too few rows are held
        out to say which is. None if it was asked to stop: the last checkpoint is on disk, and the
        next call goes on from there.

    Raises:
        StoreError: A column is missing or damaged.
        TrainingError: The rows or the memory do not do for these settings, or the loss is not
            finite.
        CheckpointError: The checkpoint in `run_dir` is of another training, or damaged, or a new
            one cannot be written.
    """
    ring = Ring.of_processes()
    rows = TrainingRows.select(open_columns(stores, config, image, text), weights, config)
    config = rows.settled(config, ring)
    folder = CheckpointFolder(run_dir)
    described = describe(rows.columns, weights, config, seed)
    checkpoint = _resume(folder, described, ring)
    if checkpoint is not None and checkpoint.metadata["finished"]:
        return folder.best
    with _random_numbers(device, seed):
        model = build_described(described, config.head).to(device)
        heldout = rows.heldout(config, device) if ring.leads else None
        training = Training(
            config=config,
            seed=seed,
            device=device,
            loader=rows.loader(config, seed=seed, device=device, ring=ring),
            heldout=heldout,
            model=model,
            optimizer=build_optimizer(model, config.optimizer),
            described=described,
            folder=folder,
            ring=ring,
        )
        if checkpoint is not None:
            training.restore(checkpoint)
        elif config.start == "cca":
            kept = moments or run_dir / "moments"
            rows.start(model, config, heldout, kept=kept, device=device, ring=ring)
        ring.copy_from_first(model.parameters())
        log = MetricsLog(run_dir, step=training.step) if ring.leads else None
        closed = closing(log) if log is not None else nullcontext()
        with closed, _keeping_steps(training, log):
            if checkpoint is None and (config.start == "cca" or not training.total_steps):
                _score_start(training, log)
            _run_steps(training, log, should_stop, on_step)
    return folder.best if training.is_finished else None


def _score_start(training: Training, log: MetricsLog | None) -> None:
    """Score the first weights, with which later steps are compared; save them if they are all."""
    training.evaluate()
    if log is not None:
        log.write(training, {f"heldout/{k}": v for k, v in training.scores.items()})
    if training.is_finished:
        training.save(log)


def _resume(folder: CheckpointFolder, described: dict[str, Any], ring: Ring) -> Checkpoint | None:
    """Let the first process put the folder in order before the others look at it."""
    checkpoint = folder.resume(described) if ring.leads else None
    ring.greatest()
    if not ring.leads and folder.last.exists():
        checkpoint = Checkpoint.open(folder.last)
    return checkpoint


@contextmanager
def _random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch, and give the caller its random numbers back in the end."""
    devices = [device] if is_gpu(device) else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
