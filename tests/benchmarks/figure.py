"""One measured figure that stands for a goal, and how it is written down."""

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> str:
    """Name what the figure was measured on."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name())
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


@dataclass(frozen=True)
class Figure:
    """A row of docs/figures.json; see the design's contract."""

    figure: str
    value: float
    unit: str
    goal: float | None
    direction: str
    """`min`: the goal is the least value that is good enough; `max`: the greatest."""
    n: int
    spread: float
    """Greatest less least of the n measurements."""
    command: str
    machine: str = field(default_factory=machine)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @property
    def ok(self) -> bool:
        """Whether the goal is met."""
        if self.goal is None:
            return True
        return self.value >= self.goal if self.direction == "min" else self.value <= self.goal

    @property
    def is_far_from_goal(self) -> bool:
        """Whether the goal is missed by more than the measurements differ among themselves."""
        return not self.ok and abs(self.value - float(self.goal or 0)) > self.spread

    def as_dict(self) -> dict[str, Any]:
        """Return the figure as JSON holds it."""
        return asdict(self) | {"ok": self.ok}


def figure_of(
    name: str,
    values: Sequence[float],
    *,
    unit: str,
    goal: float | None,
    direction: str,
    module: str,
    device: str = "cpu",
) -> Figure:
    """Make a figure of the median of several measurements."""
    return Figure(
        figure=name,
        value=round(statistics.median(values), 4),
        unit=unit,
        goal=goal,
        direction=direction,
        n=len(values),
        spread=round(max(values) - min(values), 4),
        command=f"python -m tests.benchmarks.{module}",
        machine=machine(device),
    )
