"""The figures of a GPU are measured by code that runs on one."""

import torch

from tests.benchmarks import gpu

FIRST = torch.device("cuda:0")


def test_steps_and_losses_are_measured_small() -> None:
    small = ["align.batch_size=8", "align.head.dim=8", "align.head.depth=1"]
    figures = gpu.step_figures(FIRST, "sail", (16, 24), overrides=small, repeats=1)
    figures += gpu.loss_figures(FIRST, batches=[32], repeats=1)
    assert [figure.unit for figure in figures] == ["s", "ratio", "s", "ratio of time"]
    assert all(figure.value > 0 for figure in figures)
