"""Lion against its definition, the groups, and the schedule at the points one can work out."""

import pytest
import torch
from torch import nn

from align.config import HeadConfig, OptimizerConfig
from align.heads import build_model
from align.optimizer import build_optimizer, learning_rate, set_learning_rate


def test_lion_follows_its_definition_for_three_steps() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    module = nn.ParameterList([weight])
    config = OptimizerConfig(
        kind="lion", learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.99
    )
    optimizer = build_optimizer(module, config)
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for _ in range(3):
        gradient = torch.randn_like(weight)
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        expected = expected - 0.1 * (update + 0.5 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_lion_takes_no_closure() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerConfig(kind="lion"))
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: 0.0)


def test_only_matrices_are_decayed_unless_all_are() -> None:
    model = build_model(dict(HeadConfig(dim=4, depth=2)), image_dim=3, text_dim=5)
    decayed, others = build_optimizer(model, OptimizerConfig(weight_decay=0.2)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    assert all(weight.ndim >= 2 for weight in decayed["params"])
    assert any(weight is model.log_scale for weight in others["params"])
    (everything,) = build_optimizer(model, OptimizerConfig(decay_all=True)).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.0)
    assert learning_rate(0, 1, config) == 1.0


def test_the_learning_rate_reaches_every_group() -> None:
    model = build_model(dict(HeadConfig(dim=4, depth=2)), image_dim=3, text_dim=5)
    optimizer = build_optimizer(model, OptimizerConfig())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
