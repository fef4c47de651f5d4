"""Computes once the position tables that vision models would interpolate in every forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

METHOD = "interpolate_pos_encoding"


def fix_position_tables(model: nn.Module, forward: Callable[[], object]) -> int:
    """Let a model reuse its interpolated position table, since its images have one size.

    Dinov2 and others hold a table for 37 × 37 patches and resize it, in each forward pass, to the
    patches of the image. A table is kept where one call made it, and where it does not change with
    the image; the output stays the same to the bit.

    Args:
        model: A vision model of transformers, which is changed.
        forward: Runs the model once on an image of the size that all will have.

    Returns:
        How many tables are kept.
    """
    modules = [module for module in model.modules() if callable(getattr(module, METHOD, None))]
    calls = [_record(module) for module in modules]
    try:
        forward()
    finally:
        for module in modules:
            delattr(module, METHOD)  # what `_record` set; the class's own method shows again
    kept = 0
    for module, made in zip(modules, calls, strict=True):
        if len(made) == 1 and _is_constant(module, *made[0]):
            setattr(module, METHOD, _Constant(made[0][1]))
            kept += 1
    return kept


def free_position_tables(model: nn.Module) -> None:
    """Undo `fix_position_tables`, so that images of other sizes get tables of their own."""
    for module in model.modules():
        if isinstance(vars(module).get(METHOD), _Constant):
            delattr(module, METHOD)


class _Constant:
    """Stands in for the method."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __call__(self, *_: object, **__: object) -> Tensor:
        return self._table


def _record(module: nn.Module) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Note arguments and results of the method from now on."""
    original = getattr(module, METHOD)
    calls: list[tuple[tuple[Any, ...], Tensor]] = []

    def recorded(*arguments: Any) -> Tensor:
        table: Tensor = original(*arguments)
        calls.append((arguments, table))
        return table

    setattr(module, METHOD, recorded)
    return calls


def _is_constant(module: nn.Module, arguments: tuple[Any, ...], table: Tensor) -> bool:
    """Return whether other embeddings give the same table."""
    others = [torch.ones_like(each) if torch.is_tensor(each) else each for each in arguments]
    again: Tensor = getattr(module, METHOD)(*others)
    return torch.equal(table, again)
