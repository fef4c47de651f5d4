"""Logistic regression on frozen features, to convergence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

REGULARISATIONS = tuple(float(value) for value in 10.0 ** np.arange(-6, 1))
ROWS_AT_ONCE = 16_384
TOLERANCE = 1e-4
"""Greatest entry of the gradient at which a fit has converged, as in scikit-learn."""
STEPS = 1000


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier."""

    weight: Float64[Tensor, "classes dim"]
    bias: Float64[Tensor, "classes"]
    mean: Float32[Tensor, "dim"]
    scale: float
    """Features are centred, then divided by this: one number, so that directions keep their
    weight."""
    regularisation: float
    """λ that was chosen."""
    held_out: dict[float, float]
    """Accuracy on the held-out rows by λ."""
    converged: bool
    """Whether the last fit came to the tolerance within the steps."""

    @torch.no_grad()
    def predict(self, features: Float[np.ndarray, "rows dim"]) -> Int64[np.ndarray, "rows"]:
        """Return the class of each row."""
        predicted = [
            F.linear(_scaled(block, self.mean, self.scale).double(), self.weight, self.bias).argmax(
                dim=1
            )
            for block in _blocks(features)
        ]
        return torch.cat(predicted).cpu().numpy() if predicted else np.empty(0, dtype=np.int64)


def fit_linear_probe(
    features: Float[np.ndarray, "rows dim"],
    labels: Int64[np.ndarray, "rows"],
    held_out: Bool[np.ndarray, "rows"],
    *,
    regularisations: Sequence[float] = REGULARISATIONS,
    device: torch.device | None = None,
) -> LinearProbe:
    """Choose the regularisation on held-out rows, then fit all rows with it, to convergence.

    Minimises the mean cross-entropy plus λ/2 · ‖W‖², the bias free: scikit-learn's
    `LogisticRegression` with C = 1 / (λ · rows). By L-BFGS of torch, because it also runs on a
    GPU, where a probe of ImageNet takes a minute, and adds no dependency. Strong regularisation
    comes first, and each fit begins where the one before ended. Parameters, logits and loss are
    float64: in float32 the line search stalls before the gradient is as small as wanted.

    Args:
        features: Of the training rows, of any float dtype; held once more as float32.
        labels: Their classes.
        held_out: Rows on which λ is chosen; both some and not all.
        regularisations: The λ that are tried.
        device: Where it is computed; the CPU if not given.

    Raises:
        ValueError: All rows or none are held out.

    Reference:
        Radford et al. 2021, CLIP, arXiv:2103.00020, appendix A.3 (L-BFGS, λ by validation rows).
    """
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{int(held_out.sum())} of {len(labels)} rows are held out to choose the "
            f"regularisation. Some and not all were expected. Hold out others."
        )
    problem = _Problem.of(features, labels, device or torch.device("cpu"))
    chosen = torch.from_numpy(~held_out).to(problem.rows.device)
    accuracies: dict[float, float] = {}
    parameters = problem.zeros()
    for regularisation in sorted(regularisations, reverse=True):
        problem.fit(parameters, regularisation, chosen)
        accuracies[regularisation] = problem.accuracy(parameters, ~chosen)
    # Of equally good ones the strongest, which came first.
    best = max(accuracies, key=lambda regularisation: accuracies[regularisation])
    parameters = problem.zeros()
    converged = problem.fit(parameters, best, torch.ones_like(chosen))
    weight, bias = parameters[:, :-1].detach(), parameters[:, -1].detach()
    return LinearProbe(weight, bias, problem.mean, problem.scale, best, accuracies, converged)


@dataclass(frozen=True)
class _Problem:
    """The rows that are fitted."""

    rows: Float32[Tensor, "rows dim"]
    labels: Int64[Tensor, "rows"]
    mean: Float32[Tensor, "dim"]
    scale: float
    classes: int

    @classmethod
    def of(
        cls,
        features: Float[np.ndarray, "rows dim"],
        labels: Int64[np.ndarray, "rows"],
        device: torch.device,
    ) -> "_Problem":
        mean = torch.from_numpy(features.mean(axis=0, dtype=np.float64).astype(np.float32))
        mean = mean.to(device)
        rows = torch.cat([_scaled(block, mean, 1.0) for block in _blocks(features)])
        scale = max(float(rows.square().mean().sqrt()), 1e-12)
        classes = int(labels.max()) + 1
        return cls(rows.div_(scale), torch.from_numpy(labels).to(device), mean, scale, classes)

    def zeros(self) -> Float64[Tensor, "classes columns"]:
        """Return weights and, in the last column, biases to begin with."""
        shape = (self.classes, self.rows.shape[1] + 1)
        return torch.zeros(shape, dtype=torch.float64, device=self.rows.device, requires_grad=True)

    def fit(
        self,
        parameters: Float64[Tensor, "classes columns"],
        regularisation: float,
        chosen: Bool[Tensor, "rows"],
    ) -> bool:
        """Minimise over the chosen rows, in place; return whether the gradient is as good as 0."""
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=STEPS,
            max_eval=2 * STEPS,
            tolerance_grad=TOLERANCE,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        numbers = torch.nonzero(chosen)[:, 0]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = regularisation / 2 * parameters[:, :-1].square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach()
            for part in torch.split(numbers, ROWS_AT_ONCE):
                logits = self.logits(parameters, part)
                share = F.cross_entropy(logits, self.labels[part], reduction="sum") / len(numbers)
                share.backward()  # type: ignore[no-untyped-call]
                total = total + share.detach()
            return total

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        closure()
        gradient = parameters.grad
        return gradient is not None and float(gradient.abs().max()) <= TOLERANCE

    @torch.no_grad()
    def accuracy(
        self, parameters: Float64[Tensor, "classes columns"], chosen: Bool[Tensor, "rows"]
    ) -> float:
        numbers = torch.nonzero(chosen)[:, 0]
        right = 0
        for part in torch.split(numbers, ROWS_AT_ONCE):
            predicted = self.logits(parameters, part).argmax(dim=1)
            right += int((predicted == self.labels[part]).sum())
        return right / len(numbers)

    def logits(
        self, parameters: Float64[Tensor, "classes columns"], part: Int64[Tensor, "part"]
    ) -> Float64[Tensor, "part classes"]:
        return F.linear(self.rows[part].double(), parameters[:, :-1], parameters[:, -1])


def _blocks(features: Float[np.ndarray, "rows dim"]) -> list[np.ndarray]:
    return [
        features[start : start + ROWS_AT_ONCE] for start in range(0, len(features), ROWS_AT_ONCE)
    ]


def _scaled(
    features: Float[np.ndarray, "rows dim"], mean: Float32[Tensor, "dim"], scale: float
) -> Float32[Tensor, "rows dim"]:
    rows = torch.from_numpy(features.astype(np.float32)).to(mean.device)
    return (rows - mean) / scale
