"""Time and memory of the blocked loss against the dense one and that of open_clip, on the CPU.

open_clip's method is made anew from its source (`SigLipLoss._loss`, without chunks): a matrix of
logits, one of labels, their product and its logsigmoid, all whole, left to autograd.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from align.loss import LossOptions, contrastive_loss
from tests.benchmarks.figure import Figure, figure_of
from tests.pairs import pairs_of

ROOT = Path(__file__).parents[2]


class Inputs:
    """Embeddings, scale and bias of one batch with one caption per image."""

    def __init__(self, batch: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(batch, dim, generator=generator).requires_grad_()
        self.text = torch.randn(batch, dim, generator=generator).requires_grad_()
        self.log_scale = torch.tensor(2.3, requires_grad=True)
        self.bias = torch.tensor(-10.0, requires_grad=True)

    def normalised(self) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image, dim=-1), F.normalize(self.text, dim=-1)


def blocked(inputs: Inputs) -> None:
    """Ours, forward and backward."""
    contrastive_loss(
        inputs.image,
        inputs.text[:, None],
        log_scale=inputs.log_scale,
        bias=inputs.bias,
        pairs=pairs_of(torch.ones(len(inputs.text), 1)),
        options=LossOptions(),
    ).backward()


def dense(inputs: Inputs) -> None:
    """The definition, as one writes it: a matrix of signs."""
    image, text = inputs.normalised()
    logits = inputs.log_scale.exp() * image @ text.T + inputs.bias
    signs = 2 * torch.eye(len(image)) - 1
    (-F.logsigmoid(signs * logits).sum() / len(image)).backward()


def open_clip(inputs: Inputs) -> None:
    """The method of open_clip 2.x."""
    image, text = inputs.normalised()
    logits = inputs.log_scale.exp() * image @ text.T
    logits += inputs.bias
    labels = -torch.ones((len(image), len(image)))
    labels = 2 * torch.eye(len(image)) + labels
    (-F.logsigmoid(labels * logits).sum() / image.shape[0]).backward()


METHODS: dict[str, Callable[[Inputs], None]] = {
    "blocked": blocked,
    "dense": dense,
    "open_clip": open_clip,
}


def seconds(method: str, batch: int, dim: int) -> float:
    inputs = Inputs(batch, dim)
    started = time.perf_counter()
    METHODS[method](inputs)
    return time.perf_counter() - started


def memory_of_child(method: str, batch: int, dim: int) -> tuple[int, int]:
    """Bytes at the peak, and those above what the inputs took, in a process of its own."""
    arguments = ["--memory", method, str(batch), str(dim)]
    command = [sys.executable, "-m", "tests.benchmarks.loss", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, extra = json.loads(done.stdout)
    return peak, extra


def own_memory(method: str, batch: int, dim: int) -> tuple[int, int]:
    METHODS[method](Inputs(8, dim))  # what the libraries allocate at their first use
    inputs = Inputs(batch, dim)
    before = _resident("VmRSS")
    METHODS[method](inputs)
    peak = _resident("VmHWM")
    return peak, peak - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def time_figures(batch: int, dim: int, rounds: int) -> list[Figure]:
    taken = [{name: seconds(name, batch, dim) for name in METHODS} for _ in range(rounds)]
    return [
        figure_of(
            f"blocked loss / {what}, batch {batch}, {dim}-d, float32",
            [round_["blocked"] / round_[other] for round_ in taken],
            unit="ratio of time",
            goal=goal,
            direction="max",
            module="loss",
        )
        for other, what, goal in [
            ("dense", "dense eager loss", 0.9),
            ("open_clip", "method of open_clip's SigLipLoss", 1.0),
        ]
    ]


def memory_figures(batch: int, dim: int, *, small: int, large: int, largest: int) -> list[Figure]:
    """Memory beside the dense loss, its growth, and the greatest batch."""
    beside_dense = (
        memory_of_child("blocked", batch, dim)[1] / memory_of_child("dense", batch, dim)[1]
    )
    growth = memory_of_child("blocked", large, 64)[1] / memory_of_child("blocked", small, 64)[1]
    peak = memory_of_child("blocked", largest, 32)[0] / 1e9
    rows = [
        (f"extra memory of blocked / dense loss, batch {batch}", beside_dense, "ratio", 1 / 6),
        (
            f"growth of extra memory / growth of the batch, {small} to {large}, 64-d",
            growth / (large / small),
            "ratio",
            1.0,
        ),
        (f"peak memory of a process with batch {largest}, 32-d", peak, "GB", 6.0),
    ]
    return [
        figure_of(name, [value], unit=unit, goal=goal, direction="max", module="loss")
        for name, value, unit, goal in rows
    ]


def measure(rounds: int = 5) -> list[Figure]:
    """Return the ratios at the batch of the recipe `sail`, and memory up to a batch of 131,072."""
    return [
        *time_figures(16_384, 768, rounds),
        *memory_figures(16_384, 768, small=8192, large=65_536, largest=131_072),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", nargs=3, metavar=("METHOD", "BATCH", "DIM"))
    arguments = parser.parse_args()
    if arguments.memory:
        method, batch, dim = arguments.memory
        print(json.dumps(own_memory(method, int(batch), int(dim))))
        return
    for figure in measure():
        print(json.dumps(figure.as_dict()) if arguments.json else figure)


if __name__ == "__main__":
    main()
