"""Attention of the last block of a vision transformer that keeps its patches apart.

A transformer mixes its patches, and the last block of one that was trained for the whole image does
so in a way that blurs where things are. Training-free segmentation replaces what that block attends
to; everything else stays the encoder's own.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from features.config import PatchAttention
from features.errors import EncoderError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj")
SIMILARITIES: dict[PatchAttention, tuple[str, ...]] = {
    "maskclip": (),
    "qq": ("q_proj",),
    "kk": ("k_proj",),
    "vv": ("v_proj",),
    "sclip": ("q_proj", "k_proj"),
    "clearclip": ("q_proj",),
}
"""Projections that are compared with themselves; where there are several, the maps are added."""


@contextmanager
def last_attention(model: nn.Module, kind: PatchAttention) -> Iterator[None]:
    """Let the last block of a model attend in another way while the context is open.

    Args:
        model: A vision transformer of transformers; as it was when the context closes.
        kind: `plain` changes nothing; see `PatchAttention`.

    Raises:
        EncoderError: The model has no such block.

    Reference:
        Zhou et al. 2022, Extract Free Dense Labels from CLIP (MaskCLIP), arXiv:2112.01071: a
        patch attends to itself alone. Wang et al. 2024, SCLIP, arXiv:2312.01597: queries with
        queries plus keys with keys. Lan et al. 2024, ClearCLIP, arXiv:2407.12442: queries with
        queries, without the residual and the MLP.
    """
    if kind == "plain":
        yield
        return
    path, own = _last(model)
    block, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    instead = _SelfSimilarity(own, SIMILARITIES[kind])
    with ExitStack() as stack:
        setattr(block, name, instead)
        stack.callback(setattr, block, name, own)
        if kind == "clearclip":
            _leave_out_the_rest(block, instead, stack)
        yield


class _SelfSimilarity(nn.Module):
    """Stands in for an attention, whose projections it uses."""

    def __init__(self, own: nn.Module, projections: tuple[str, ...]) -> None:
        super().__init__()
        self._own: Any = own
        self._twins = nn.ModuleList(_compared_with_itself(own, each) for each in projections)
        self._out: Any = _output(own)

    def forward(self, hidden_states: Tensor, *others: Any, **options: Any) -> tuple[Tensor, None]:
        if not self._twins:
            return self._out(self._own.v_proj(hidden_states)), None
        first, *more = [twin(hidden_states, *others, **options)[0] for twin in self._twins]
        for output in more:  # of two maps, whose sum passes the output projection once
            first = first + output
            if self._out.bias is not None:
                first = first - self._out.bias
        return first, None


def _compared_with_itself(own: nn.Module, projection: str) -> nn.Module:
    """Return a copy of an attention whose queries and keys are one and the same projection."""
    twin = copy.deepcopy(own)
    same = twin.get_submodule(projection)
    twin.register_module("q_proj", same)
    twin.register_module("k_proj", same)
    return twin


def _leave_out_the_rest(block: nn.Module, attention: nn.Module, stack: ExitStack) -> None:
    """Let a block give what its attention gives, scaled where the block scales it."""
    scale = getattr(block, "layer_scale1", nn.Identity())
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: tuple[Tensor, None]) -> None:
        seen.append(output[0])

    def give(_module: nn.Module, _inputs: Any, _output: Tensor) -> Tensor:
        given: Tensor = scale(seen.pop())
        return given

    stack.callback(attention.register_forward_hook(keep).remove)
    stack.callback(block.register_forward_hook(give).remove)


def _last(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the last attention of a model and its path."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if all(isinstance(getattr(module, each, None), nn.Linear) for each in PROJECTIONS)
        and any(isinstance(getattr(module, each, None), nn.Linear) for each in OUTPUTS)
    ]
    if not found:
        raise EncoderError(
            f"{type(model).__name__} has no attention of queries, keys and values that could be "
            f"changed. A vision transformer such as Dinov2Model or ViTModel was expected. Set "
            f"`attention` of the data set in [eval.segmentation] to 'plain'."
        )
    return found[-1]


def _output(attention: nn.Module) -> nn.Module:
    return next(
        module
        for name in OUTPUTS
        if isinstance(module := getattr(attention, name, None), nn.Module)
    )
