"""What a training is at a step: model, optimizer, the best so far; and how one step changes it."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from align.checkpoint import STATE, Checkpoint, Snapshot, load_weights, read_tensors
from align.config import AlignConfig
from align.head import AlignmentModel
from align.heldout import HeldOut
from align.loader import Batch, Loader
from align.loss import LossOptions, contrastive_loss
from align.optimizer import learning_rate, set_learning_rate
from align.pairs import Pairs

logger = logging.getLogger(__name__)
CHOSEN_BY = "recall@10"


@dataclass
class Training:
    """Everything that goes into a checkpoint, and what is needed to change it."""

    config: AlignConfig
    seed: int
    device: torch.device
    loader: Loader
    heldout: HeldOut | None
    model: AlignmentModel
    optimizer: Optimizer
    described: dict[str, Any]
    """What checkpoints say that this training was given."""
    step: int = 0
    """Updates made."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores on the held-out rows, if they were taken at this step."""
    best_step: int = 0
    best_score: float | None = None
    best: Snapshot | None = None
    """The best weights, while they are not on disk."""

    def __post_init__(self) -> None:
        per_epoch = self.loader.steps_per_epoch
        self.total_steps = self.config.steps or max(1, round(self.config.epochs * per_epoch))
        loss = self.config.loss
        rows = loss.block_rows or (4096 if self.device.type == "cuda" else 1024)
        self._loss_options = LossOptions(loss.kind, loss.normalise, rows)
        self._autocast_type = autocast_type(self.config, self.device)
        # Kept on the device: to look at every loss would make the CPU wait for it.
        self._failed_at = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def epoch(self) -> float:
        """Passes over the training rows that were made."""
        return self.step / self.loader.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        """Whether every update was made."""
        return self.step >= self.total_steps

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
        if self.config.head.dropout:
            torch.manual_seed((self.seed << 32) + self.step)
        loss = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if (norm := self.config.optimizer.max_grad_norm) is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        set_learning_rate(self.optimizer, self.rate)
        self.optimizer.step()
        self.model.clamp_scale()
        self.step += 1
        self.scores = {}
        loss = loss.detach()
        self._failed_at += self.step * (~loss.isfinite() & (self._failed_at == 0))
        return loss

    def evaluate(self) -> None:
        """Score the held-out rows, and keep a copy of the weights if they are the best so far."""
        if self.heldout is None:
            return
        with self._autocast():
            self.scores = self.heldout.score(self.model)
        score = self.scores[CHOSEN_BY]
        if self.best_score is None or score > self.best_score:
            self.best_step, self.best_score = self.step, score
            self.best = self.snapshot()

    def snapshot(self) -> Snapshot:
        """Return a copy of the weights, with what is said about them."""
        weights = {
            name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
        }
        metadata = {
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": self.epoch,
            "finished": self.is_finished,
            "heldout": self.scores,
            "best_step": self.step if self.best_score is None else self.best_step,
            "best_score": self.best_score,
            "run": self.described,
        }
        return Snapshot(self.step, weights, metadata)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors, named `<number of the weight>/<name>`."""
        return {
            f"{number}/{name}": tensor.detach().cpu().contiguous()
            for number, values in self.optimizer.state_dict()["state"].items()
            for name, tensor in values.items()
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was made.

        Raises:
            CheckpointError: One of its files is damaged.
        """
        load_weights(self.model, checkpoint)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(checkpoint.path / STATE).items():
            number, name = key.split("/")
            state.setdefault(int(number), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = checkpoint.step
        self.scores = checkpoint.heldout
        self.best_step = checkpoint.metadata["best_step"]
        self.best_score = checkpoint.metadata["best_score"]
        logger.info("going on from step %d of %d", self.step, self.total_steps)

    def _loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            image = self.model.embed_image(batch.image)
            text = self.model.embed_text(batch.text.flatten(0, 1))  # all fields in one product
        fields = batch.weights.shape[1]
        return contrastive_loss(
            image,
            text.view(-1, fields, text.shape[-1]),
            log_scale=self.model.log_scale,
            bias=self.model.bias,
            pairs=Pairs(fields, batch.weights.flatten(), batch.caption_ids),
            options=self._loss_options,
        )

    def _autocast(self) -> torch.autocast:
        kind = self._autocast_type
        return torch.autocast(self.device.type, kind or torch.bfloat16, enabled=kind is not None)


def autocast_type(config: AlignConfig, device: torch.device) -> torch.dtype | None:
    """Return the type of the matrix products, None for that of the weights (float32)."""
    if config.precision == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_it else None
    return torch.bfloat16 if config.precision == "bfloat16" else None
