"""A step of the star head over frozen features, beside the same layers as plain autograd has them.

The plain module lets autograd form the gradient of the input of the first two layers, the only use
of which are the LayerNorm's own weights; ours finds those without it.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from align.heads import GATE_LIMIT, StarHead
from tests.benchmarks.figure import Figure, figure_of


class PlainStarHead(nn.Module):
    """The same formula, layer by layer."""

    def __init__(self, head: StarHead) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(head.norm.features)
        self.f1, self.f2, self.g = head.f1, head.f2, head.g

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        normalised = self.norm(features)
        gate = F.relu6(self.f1(normalised))
        embedding: torch.Tensor = self.g(gate * self.f2(normalised).clamp(-GATE_LIMIT, GATE_LIMIT))
        return embedding


def seconds_of_a_step(head: nn.Module, features: torch.Tensor) -> float:
    """Time forward and backward."""
    head.zero_grad()
    started = time.perf_counter()
    head(features).square().mean().backward()
    return time.perf_counter() - started


def measure(dim: int = 4096, rows: int = 2048, rounds: int = 2) -> list[Figure]:
    """Return our time as a share of the plain one's: NV-Embed's 4096 numbers, width 8, to 1024."""
    torch.manual_seed(0)
    ours = StarHead(dim, dim=1024)
    plain = PlainStarHead(ours)
    features = torch.randn(rows, dim)
    for head in (ours, plain):  # to warm up
        seconds_of_a_step(head, features[:32])
    ratios = [
        seconds_of_a_step(ours, features) / seconds_of_a_step(plain, features)
        for _ in range(rounds)
    ]
    return [
        figure_of(
            f"star head step / plain autograd, {dim}-d, {rows} rows",
            ratios,
            unit="ratio of seconds",
            goal=0.78,
            direction="max",
            module="head",
        )
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
