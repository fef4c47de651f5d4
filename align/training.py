"""What a training is at a step: model, optimizer, the best so far; and how one step changes it."""

import logging
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from align.checkpoint import STATE, Checkpoint, Snapshot, load_weights, read_tensors
from align.config import AlignConfig
from align.gradients import Gradients
from align.head import AlignmentModel
from align.heldout import HeldOut
from align.loader import Batch, Loader
from align.loss import ALONE
from align.optimizer import learning_rate, set_learning_rate
from align.ring import Ring

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
