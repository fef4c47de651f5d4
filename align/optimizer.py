"""The update rules, what they decay, and the schedule of the learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from align.config import OptimizerConfig


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
    """Return the update rule over all weights of a model, in two groups: decayed or not."""
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
    """Return the learning rate of an update: linear warm-up, then half a cosine to zero.

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
    """Use a learning rate from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
