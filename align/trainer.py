"""Stage two: train the head on the features of a store, from a checkpoint if there is one.

A run is a function of its settings, its seed and the store: the order of the rows and every random
number of a step depend on the seed and the step alone. So a run that was killed and resumed ends
with the same weights, bit for bit, as one that was not (on one device, with as many threads).

The processes that torch.distributed has joined train one head together: each takes its share of
every batch, and the result is that of one process but for the order in which numbers are summed.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from align.checkpoint import (
    STATE,
    Checkpoint,
    CheckpointFolder,
    Snapshot,
    load_weights,
    read_tensors,
)
from align.columns import Columns, PairedStore, Selection, select_rows
from align.config import AlignConfig
from align.heads import AlignmentModel, build_model
from align.heldout import HeldOut, HeldOutRows
from align.loader import MIB, Batch, Loader, LoaderOptions, Source
from align.loss import ALONE
from align.optimizer import (
    Gradients,
    autocast_type,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from align.processes import Ring
from align.windows import shares
from features.errors import TrainingError
from features.storage.column import Column
from features.storage.files import write
from features.storage.fingerprint import Fingerprint

ELSEWHERE = {"image", "text", "store", "text_store"}  # said of the encoders and the rows
NO_MATTER = {"cache", "cache_mb", "host_memory_mb", "verify"}


def open_columns(
    stores: Sequence[PairedStore], config: AlignConfig, image: str, text: str
) -> list[Columns]:
    """Open what a training reads of each store, and check that it goes together.

    Raises:
        StoreError: A column is not there.
        TrainingError: The stores have not the rows or the caption fields that they should, or their
            features are not of the same encoders.
    """
    opened = [Columns.open(each, config, image, text) for each in stores]
    for columns in opened[1:]:
        _check_same_encoder(opened[0].image, columns.image)
        _check_same_encoder(opened[0].text[0], columns.text[0])
    return opened


def training_data(
    columns: Sequence[Columns],
    weights: Sequence[float],
    config: AlignConfig,
    *,
    seed: int,
    device: torch.device,
) -> tuple[Loader, HeldOut | None]:
    """Decide on every row of the stores, and make the loader and the held-out rows.

    Args:
        columns: Of each store.
        weights: How many rows of a batch come from each, in proportion.
        config: Settings.
        seed: Of the order.
        device: Where the features go.

    Returns:
        The loader of this process, and the held-out rows where it is the first of several.

    Raises:
        TrainingError: The rows or the memory do not do for these settings.
    """
    ring = Ring.of_processes()
    scored = shares(weights, config.holdout_rows)
    limits = [None] * len(scored) if config.rows is None else shares(weights, config.rows)
    selections = [
        select_rows(each, holdout=config.holdout, holdout_rows=of_scored, rows=rows)
        for each, of_scored, rows in zip(columns, scored, limits, strict=True)
    ]
    identical = config.loss.positives == "identical"
    loader = Loader(
        [
            _source(each, selection, config, weight)
            for each, selection, weight in zip(columns, selections, weights, strict=True)
        ],
        LoaderOptions(
            batch_size=config.batch_size,
            memory_bytes=config.memory_mb * MIB,
            host_memory_bytes=config.host_memory_mb * MIB,
            seed=seed,
            captions_per_image=config.captions_per_image,
            with_caption_ids=identical,
            verify=config.verify,
            cache=config.cache,
            cache_bytes=config.cache_mb * MIB,
            device=device,
            rank=ring.rank,
            ranks=ring.size,
        ),
    )
    parts = [
        HeldOutRows(each, selection.heldout, selection.text_ok[selection.heldout])
        for each, selection in zip(columns, selections, strict=True)
        if ring.leads and len(selection.heldout)
    ]
    return loader, HeldOut(parts, identical=identical, device=device) if parts else None


def describe(
    columns: Sequence[Columns], weights: Sequence[float], config: AlignConfig, seed: int
) -> dict[str, Any]:
    """Return what decides the result of a training, as JSON."""
    first = columns[0]
    described: dict[str, Any] = {
        "align": config.model_dump(mode="json", exclude=ELSEWHERE | NO_MATTER),
        "seed": seed,
        "fields": list(first.fields),
        "image": _describe_encoder(first.image),
        "text": _describe_encoder(first.text[0]),
        "store": _describe_rows(first),
    }
    if len(columns) > 1:
        described["mixed"] = [
            {**_describe_rows(each), "fields": list(each.fields), "weight": weight}
            for each, weight in zip(columns, weights, strict=True)
        ]
    return described


def _source(columns: Columns, selection: Selection, config: AlignConfig, weight: float) -> Source:
    of_fields = config.loss.field_weights
    return Source(
        columns,
        selection.train,
        selection.text_ok,
        field_weights=tuple(of_fields.get(name, 1.0) for name in columns.fields),
        weight=weight,
    )


def _describe_encoder(column: Column) -> dict[str, Any]:
    described = {
        "name": column.name.split("/")[1],
        "dim": column.dim,
        "fingerprint": column.fingerprint,
    }
    return described | ({"dtype": column.dtype.name} if column.is_scaled else {})


def _describe_rows(columns: Columns) -> dict[str, Any]:
    return {"rows": columns.store.rows, "keys_sha256": columns.store.keys_sha256}


def _check_same_encoder(ours: Column, other: Column) -> None:
    found = Fingerprint(other.fingerprint | {"dim": other.dim})
    for name, value, expected in found.differences(ours.fingerprint | {"dim": ours.dim}):
        raise TrainingError(
            f"{other.path} has {name} = {value!r}, but {ours.path} has {expected!r}. Features of "
            f"the same encoder were expected in all stores of align.mix. Extract one of them again."
        )


class MetricsLog:
    """One JSON object per line, with units in the names; the numbers go to TensorBoard as well.

    A resumed run cuts the file back to the step it goes on from, so that in the end every step is
    there once.
    """

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        _cut_back(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Add what was measured after a step (the number of updates made)."""
        line = {"step": step, "epoch": round(epoch, 4), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            name = name if "/" in name else f"train/{name}"
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
        self._board.close()


def _cut_back(path: Path, step: int) -> None:
    """Keep the lines up to a step; a line cut off by a kill is dropped."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    write(path, "".join(f"{line}\n" for line in kept).encode())


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


logger = logging.getLogger(__name__)
CHOSEN_BY = "mean_recall"
WEIGHTS = "weights"  # in the state: those that are trained, where an average of them is the result


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
    scores_since_best: int = 0
    """How many times in a row the held-out rows were scored without a new best."""

    def __post_init__(self) -> None:
        per_epoch = self.loader.steps_per_epoch
        self.total_steps = self.config.steps or max(1, round(self.config.epochs * per_epoch))
        self.gradients = Gradients(
            self.model, self.config, seed=self.seed, device=self.device, ring=self.ring
        )
        self._average: AveragedModel | None = None
        if self.config.ema is not None:
            average = get_ema_multi_avg_fn(self.config.ema)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(self.model, multi_avg_fn=average)
        if self.config.compile and self.device.type == "cuda":
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
        averaged = self.model if self._average is None else self._average.module
        return cast(AlignmentModel, averaged)

    @property
    def rate(self) -> float:
        """Learning rate of the next update."""
        return learning_rate(self.step, self.total_steps, self.config.optimizer)

    @property
    def failed_at(self) -> int:
        """First step whose loss was not finite, 0 if there was none; waits for the device."""
        return int(self._failed_at.item())

    def update(self, batch: Batch) -> Tensor:
        """Make one update, without waiting for the device; return the loss before it."""
        loss = self.gradients.backward(batch, self.step)
        if (norm := self.config.optimizer.max_grad_norm) is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        set_learning_rate(self.optimizer, self.rate)
        self.optimizer.step()
        self.model.clamp_scale()
        if self._average is not None:
            self._average.update_parameters(self.model)
        self.step += 1
        self.scores = {}
        self._failed_at += self.step * (~loss.isfinite() & (self._failed_at == 0))
        return loss

    def evaluate(self) -> None:
        """Score the held-out rows, and keep a copy of the weights if they are the best so far."""
        with self.gradients.autocast():
            scores = {} if self.heldout is None else self.heldout.score(self.result)
        self.scores = self.ring.from_first(scores)
        if not self.scores:
            return
        score = self.scores[CHOSEN_BY]
        self.scores_since_best += 1
        if self.best_score is None or score > self.best_score:
            self.best_step, self.best_score = self.step, score
            self.scores_since_best = 0
            self.best = self.snapshot() if self.ring.leads else None

    def snapshot(self) -> Snapshot:
        """Return a copy of the weights, with what is said about them."""
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
        """Return what else the next update depends on, by name.

        That is the optimizer's state as `<number of the weight>/<name>` and, where the result is an
        average of the weights, the weights themselves as `weights/<name>`.
        """
        tensors = {
            f"{number}/{name}": tensor
            for number, values in self.optimizer.state_dict()["state"].items()
            for name, tensor in values.items()
        }
        if self._average is not None:
            weights = self.model.state_dict().items()
            tensors |= {f"{WEIGHTS}/{name}": tensor for name, tensor in weights}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was made.

        Raises:
            CheckpointError: One of its files is damaged.
        """
        load_weights(self.result, checkpoint)
        state: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(checkpoint.path / STATE).items():
            number, name = key.split("/")
            state.setdefault(number, {})[name] = tensor
        if self._average is not None:
            self.model.load_state_dict(state.pop(WEIGHTS))
            self._average.n_averaged.fill_(checkpoint.step)
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
        dict(config.head),
        image_dim=first.image.dim,
        text_dim=first.text[0].dim,
        initial_scale=config.loss.initial_scale,
        initial_bias=config.loss.initial_bias,
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
