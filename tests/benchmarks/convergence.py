"""The same training with three losses: ours, the dense definition, and the method of open_clip.

    python -m tests.benchmarks.convergence RECIPE [SECTION.KEY=VALUE ...]

The features of the recipe must be there, and `align.captions_per_image` is set to 1, since
open_clip's loss knows one caption per image. Printed is the best held-out mean recall of three
seeds each. All start from the same weights and see the same batches, so what differs is rounding.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import align.optimizer
from align.checkpoint import Checkpoint
from align.loss import contrastive_loss
from pipeline.interrupt import StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.cpu import keep_freed_memory

SEEDS = (0, 1, 2)


def dense(image: Tensor, text: Tensor, *, log_scale: Tensor, bias: Tensor, **_: Any) -> Tensor:
    """The definition, with one matrix of all logits, left to autograd."""
    image, text = F.normalize(image, dim=-1), F.normalize(text[:, 0], dim=-1)
    signs = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(signs * (log_scale.exp() * image @ text.T + bias)).sum() / len(image)


def open_clip(image: Tensor, text: Tensor, *, log_scale: Tensor, bias: Tensor, **_: Any) -> Tensor:
    """What `SigLipLoss` of open_clip 2.x does in one process."""
    image, text = F.normalize(image, dim=-1), F.normalize(text[:, 0], dim=-1)
    logits = log_scale.exp() * image @ text.T
    logits += bias
    labels = 2 * torch.eye(len(image)) - torch.ones((len(image), len(image)))
    return -F.logsigmoid(labels * logits).sum() / image.shape[0]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ours, block by block": contrastive_loss,
    "dense": dense,
    "open_clip's method": open_clip,
}


def recall_with(loss: Callable[..., Tensor], recipe: str, overrides: list[str], seed: int) -> float:
    """Train once; the best held-out mean recall."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(align.optimizer, "contrastive_loss", loss)
        features = load_config(recipe, overrides).run
        config = load_config(
            recipe,
            [
                f"run.features='{features.features or features.dir}'",
                *overrides,
                f"run.dir='{folder}'",
                f"run.seed={seed}",
                "align.captions_per_image=1",
            ],
        )
        best = align_run(config, StopRequest())
        if best is None:
            raise KeyboardInterrupt
        return float(Checkpoint.open(Path(best)).heldout["mean_recall"])


def main() -> None:
    """Train, and print a table."""
    keep_freed_memory()
    recipe, *overrides = sys.argv[1:]
    for name, loss in LOSSES.items():
        found = [recall_with(loss, recipe, overrides, seed) for seed in SEEDS]
        each = ", ".join(f"{value:.4f}" for value in found)
        print(f"{name}: {statistics.mean(found):.4f} ± {statistics.stdev(found):.4f} ({each})")


if __name__ == "__main__":
    main()
