"""Heads as torch.compile traces them; what a compiler makes of the graph for a GPU is not seen.

On the processor, and here because here no shape is checked in a function that is traced.
"""

import pytest
import torch

from align.config import HeadConfig
from align.heads import build_model
from tests import tiny


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated")  # torch does it, to trace one
@pytest.mark.parametrize("kind", tiny.TRAINED_HEADS)
@pytest.mark.parametrize("is_half", [False, True])
def test_a_compiled_head_is_one_graph_and_gives_the_same_gradients(
    kind: str, *, is_half: bool
) -> None:
    features, found = torch.randn(6, 5), []
    config = HeadConfig.model_validate({"kind": kind, "dim": 6, "depth": 3})
    for compiled in (False, True):
        torch.manual_seed(0)
        head = build_model(dict(config), image_dim=5, text_dim=9).image_head
        if compiled:
            head.compile(backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            head(features).float().square().sum().backward()
        found.append([weight.grad for weight in head.parameters()])
    tolerance = 2e-2 if is_half else 1e-5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
