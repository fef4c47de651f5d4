"""The update rules, what they decay, and the schedule of the learning rate."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from align.config import AlignConfig, OptimizerConfig
from align.heads import AlignmentModel
from align.loader import Batch
from align.loss import ALONE, LossOptions, Pairs, contrastive_loss, slices
from align.processes import Ring
from features.device.cuda import has_bfloat16, is_gpu
from features.device.memory import memory_of, one_memory_error
from features.errors import TrainingError

logger = logging.getLogger(__name__)


class Lion(Optimizer):
    """Sign of an interpolated momentum, with decoupled weight decay.

    Every weight moves by the learning rate exactly (before decay), so it wants one 3 to 10 times
    smaller than AdamW, and does not see the size of the gradient.

    Reference:
        Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675,
        Algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient.

        Raises:
            ValueError: A closure is given; it would not be called.
        """
        if closure is not None:
            raise ValueError("Lion takes no closure; compute the gradients before `step`.")
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(group, weights)

    def _update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        rate, (beta1, beta2) = group["lr"], group["betas"]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        signs = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(signs)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_add_(weights, signs, alpha=-rate)
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Make the update rule for all weights of a model, in two groups: decayed or not."""
    weights = list(model.parameters())
    matrices = [weight for weight in weights if config.decay_all or weight.ndim >= 2]
    others = [weight for weight in weights if not config.decay_all and weight.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.kind == "lion":
        return Lion(groups, lr=config.learning_rate, betas=betas)
    return AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Compute the learning rate of an update: linear warm-up, then half a cosine to zero.

    Args:
        step: Number of the update, from 0.
        total_steps: Updates of the whole run.
        config: Gives the peak and the fraction of the steps that warm up.
    """
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all weights."""
    for group in optimizer.param_groups:
        group["lr"] = rate


BLOCK_ROWS, GPU_BLOCK_ROWS = 1024, 4096
Embeddings = tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows fields dim"]]


class Gradients:
    """Computes the gradients of one batch after the other.

    With `align.micro_batch` the heads run over the batch in parts, twice: first without a graph,
    for the embeddings that the loss compares with one another; then with one, part by part, to
    carry the gradients of the embeddings on to the weights. What the heads hold is the size of a
    part, and the gradients are those of the whole batch.

    Reference:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
        arXiv:2101.06983 (GradCache).
    """

    def __init__(
        self,
        model: AlignmentModel,
        config: AlignConfig,
        fields: Sequence[str],
        *,
        seed: int,
        device: torch.device,
        ring: Ring = ALONE,
    ) -> None:
        """Take what does not change from batch to batch.

        Args:
            model: Whose gradients are computed.
            config: Settings.
            fields: Names of the caption fields that `Batch.fields` numbers.
            seed: Of the dropout.
            device: Where the batches lie.
            ring: The processes that have a share of each batch.
        """
        self.model = model
        self.seed = seed
        self.device = device
        self.ring = ring
        self._may_halve = config.micro_batch == "auto" and ring.size == 1
        self._micro_batch = None if config.micro_batch == "auto" else config.micro_batch
        self._has_dropout = config.head.dropout > 0
        loss = config.loss
        rows = loss.block_rows or (GPU_BLOCK_ROWS if is_gpu(device) else BLOCK_ROWS)
        self._options = LossOptions(loss.kind, loss.normalise, rows)
        self._autocast_type = autocast_type(config, device)
        weights = [loss.field_weights.get(name, 1.0) for name in fields]
        self._field_weights = torch.tensor([*weights, 0.0], device=device)  # the last is that of -1

    def backward(self, batch: Batch, step: int) -> Float[Tensor, ""]:
        """Set the gradients of the weights to those of a batch; return its loss, without a graph.

        Args:
            batch: This process' share of the rows; loss and gradients are those of all together.
            step: Number of the update; decides on the dropout.
        """
        while (loss := self._try(batch, step)) is None:
            self._halve(len(batch.image))
        gradients = (weight.grad for weight in self.model.parameters())
        self.ring.sum_in_place(each for each in gradients if each is not None)
        return loss.detach()

    def autocast(self) -> torch.autocast:
        """Return the context in which the heads run."""
        kind = self._autocast_type
        return torch.autocast(self.device.type, kind or torch.bfloat16, enabled=kind is not None)

    def _try(self, batch: Batch, step: int) -> Float[Tensor, ""] | None:
        """Compute gradients and loss; None if the device has not the memory."""
        self.model.zero_grad(set_to_none=True)
        try:
            with one_memory_error(), self._fast_products():
                return self._backward(batch, step)
        except torch.OutOfMemoryError as error:
            rows = len(batch.image)
            size = min(self._micro_batch or rows, rows)
            # Where processes train together the others wait for what this one computes.
            if not self._may_halve or size == 1:
                raise self._without_memory(rows, size) from error
            return None

    def _halve(self, rows: int) -> None:
        """Run the heads over half as many rows at once from now on."""
        size = min(self._micro_batch or rows, rows)
        self.model.zero_grad(set_to_none=True)
        self._micro_batch = -(-size // 2)
        torch.cuda.empty_cache()  # in pieces of the old size it is of no use
        words = "out of memory on %s with %d rows at once: goes on with align.micro_batch = %d"
        logger.warning(words, self.device, size, self._micro_batch)

    def _without_memory(self, rows: int, size: int) -> TrainingError:
        way_out = "Lower align.batch_size, align.loss.block_rows or align.memory_mb."
        if size > 1:
            way_out = f"Set align.micro_batch = {-(-size // 2)}; or lower align.memory_mb."
        return TrainingError(
            f"A training step ran out of memory on {self.device}{memory_of(self.device)}, with "
            f"{rows} rows, {size} of them in the heads at once. Room for one was expected. "
            f"{way_out}"
        )

    @contextmanager
    def _fast_products(self) -> Iterator[None]:
        """Let float32 products, those of the loss, use TF32 where the heads use bfloat16."""
        before = torch.get_float32_matmul_precision()
        if is_gpu(self.device) and self._autocast_type is not None:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _backward(self, batch: Batch, step: int) -> Float[Tensor, ""]:
        rows = len(batch.image)
        size = self._micro_batch or rows
        if size >= rows:
            loss = self._loss(*self._embed(batch, slice(0, rows), step), batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss
        with torch.no_grad():
            parts = [self._embed(batch, part, step) for part in slices(rows, size)]
        image = torch.cat([image for image, _ in parts]).requires_grad_()
        text = torch.cat([text for _, text in parts]).requires_grad_()
        loss = self._loss(image, text, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for part in slices(rows, size):
            gradients = [each.grad[part] for each in (image, text) if each.grad is not None]
            torch.autograd.backward(self._embed(batch, part, step), gradients)
        return loss

    def _embed(self, batch: Batch, part: slice, step: int) -> Embeddings:
        if self._has_dropout:  # the same masks, however often a part is embedded
            torch.manual_seed(_seed(self.seed, step, self.ring.rank, part.start))
        features = batch.text[part]
        with self.autocast():
            image = self.model.embed_image(batch.image[part])
            text = self.model.embed_text(features.flatten(0, 1))  # all fields in one product
        return image, text.view(len(features), -1, text.shape[-1])

    def _loss(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch fields dim"],
        batch: Batch,
    ) -> Float[Tensor, ""]:
        return contrastive_loss(
            image,
            text,
            log_scale=self.model.log_scale,
            bias=self.model.bias,
            pairs=Pairs(batch.fields, self._field_weights[batch.fields], batch.caption_ids),
            options=self._options,
            ring=self.ring,
        )


def autocast_type(config: AlignConfig, device: torch.device) -> torch.dtype | None:
    """Choose the type of the matrix products; None is that of the weights, float32."""
    if config.precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else None
    return torch.bfloat16 if config.precision == "bfloat16" else None


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
