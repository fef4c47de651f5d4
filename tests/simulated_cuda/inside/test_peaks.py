"""The memory of one training step of the recipes at their real sizes, which docs/training.md tells.

With SIMULATED_META=1 there is no memory: tensors are counted as the step makes and drops them.
"""

import re

import numpy as np
import pytest
import torch

from align.config import AlignConfig
from align.heads import build_model
from align.loader import Batch
from align.optimizer import Gradients, build_optimizer
from pipeline.run.config import load_config
from tests.simulated_cuda import gpu
from tests.simulated_cuda.build import ROOT

pytestmark = pytest.mark.skipif(not gpu.META, reason="needs a GPU without memory")
FIRST = torch.device("cuda:0")
DIMS = {"sail": (1024, 4096), "sail-paper": (2048, 4096)}
ROW = re.compile(r"^\| `(sail[a-z-]*)` \| (\w+) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def step_gib(name: str, config: AlignConfig) -> tuple[float, float]:
    """GiB of the weights, the optimizer's state and a batch; and the most during a step."""
    image_dim, text_dim = DIMS[name]
    with torch.device("meta"):
        model = build_model(
            dict(config.head),
            image_dim=image_dim,
            text_dim=text_dim,
            initial_scale=config.loss.initial_scale,
            initial_bias=config.loss.initial_bias,
        )
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                made = torch.empty(weight.shape, dtype=weight.dtype, device=FIRST)
                module._parameters[key] = torch.nn.Parameter(made)
    optimizer = build_optimizer(model, config.optimizer)
    gradients = Gradients(model, config, ("short", "long"), seed=0, device=FIRST)
    rows = config.batch_size
    batch = Batch(
        rows=np.arange(rows),
        image=torch.empty(rows, image_dim, dtype=torch.float16, device=FIRST),
        text=torch.empty(rows, 2, text_dim, dtype=torch.float16, device=FIRST),
        fields=torch.zeros(rows, 2, dtype=torch.int64, device=FIRST),
        caption_ids=None,
    )
    gradients.backward(batch, 0)
    optimizer.step()
    rest = gpu.seen.held
    gpu.seen.peak = 0
    gradients.backward(batch, 1)
    optimizer.step()
    return rest / gpu.GIB, gpu.seen.peak / gpu.GIB


def told() -> list[tuple[str, ...]]:
    """The rows of the table in docs/training.md."""
    rows = ROW.findall((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))
    assert len(rows) > 5
    return rows


@pytest.mark.parametrize(("name", "precision", "rows", "rest", "peak"), told())
def test_a_step_takes_the_memory_that_the_docs_tell(
    name: str, precision: str, rows: str, rest: str, peak: str
) -> None:
    at_once = [] if rows == "all" else [f"align.micro_batch={rows}"]
    config = load_config(name, [f'align.precision="{precision}"', *at_once]).align
    found = step_gib(name, config)
    assert found == pytest.approx((float(rest), float(peak)), abs=0.06), found
