"""Captions without padding: the sequences of a batch lie one behind the other in one row.

The linear layers of a transformer do not care where a sequence ends, so they run on the row as it
is. Only attention does: it is told where each sequence begins, by an attention function that is
registered with transformers under `PACKED_ATTENTION`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from features.device.cuda import to_device

PACKED_ATTENTION = "sail_packed"
Tokens = list[int]
QueriesKeysValues = tuple[Tensor, Tensor, Tensor]
"""Of all tokens of a batch, each (tokens, heads, head_dim)."""


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of tokens on a device, one behind the other, without padding."""

    ids: Int64[Tensor, "tokens"]
    positions: Int64[Tensor, "tokens"]
    """Place of each token in its sequence."""
    starts: Int32[Tensor, "boundaries"]
    """Where each sequence begins, and where the last one ends."""
    runs: tuple[tuple[int, int], ...]
    """(count, length) of neighbours of equal length, in order."""

    @classmethod
    def pack(
        cls, sequences: Sequence[Tokens], device: torch.device, *, first_position: int = 0
    ) -> "TokenBatch":
        """Put sequences behind each other; those sorted by length give the fewest runs."""
        lengths = np.array([len(sequence) for sequence in sequences])
        starts = np.concatenate([[0], lengths.cumsum()])
        ids = np.concatenate(sequences).astype(np.int64)
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + first_position
        if first_position:  # where padding has a position, text that spells it does not count
            counted = ids != first_position - 1
            before = np.concatenate([[0], counted.cumsum()])
            place = before[1:] - np.repeat(before[starts[:-1]], lengths)
            positions = place * counted + first_position - 1
        bounds = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
        return cls(
            ids=to_device(torch.from_numpy(ids), device),
            positions=to_device(torch.from_numpy(positions.astype(np.int64)), device),
            starts=to_device(torch.from_numpy(starts.astype(np.int32)), device),
            runs=tuple((stop - start, int(lengths[start])) for start, stop in pairwise(bounds)),
        )

    def to(self, device: torch.device) -> "TokenBatch":
        """Return it on another device."""
        names = ("ids", "positions", "starts")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(length for _, length in self.runs)

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest sequence."""
        return min(length for _, length in self.runs)


def batch_stop(
    lengths: Sequence[int], start: int, tokens_per_batch: int, *, equal_lengths: bool
) -> int:
    """Return where the batch that begins at `start` ends.

    A batch holds at most `tokens_per_batch` tokens, or one sequence.

    Args:
        lengths: Tokens of each sequence, sorted.
        start: First sequence of the batch.
        tokens_per_batch: The budget.
        equal_lengths: Whether all sequences of a batch must have the same length.
    """
    stop, tokens = start + 1, lengths[start]
    while stop < len(lengths) and tokens + lengths[stop] <= tokens_per_batch:
        if equal_lengths and lengths[stop] != lengths[start]:
            break
        tokens += lengths[stop]
        stop += 1
    return stop


def split_runs(
    rows: Float[Tensor, "tokens *rest"], runs: Sequence[tuple[int, int]]
) -> Iterator[Float[Tensor, "count length *rest"]]:
    """Yield a view of each run of equal lengths."""
    start = 0
    for count, length in runs:
        stop = start + count * length
        yield rows[start:stop].view(count, length, *rows.shape[1:])
        start = stop


def pool_tokens(
    states: Float[Tensor, "tokens dim"],
    runs: Sequence[tuple[int, int]],
    pooling: str,
    *,
    skip: int = 0,
) -> Float32[Tensor, "sequences feature_dim"]:
    """Make one vector of the tokens of each sequence.

    Args:
        states: What the model made of each token.
        runs: Lengths of the sequences, as in `TokenBatch`.
        pooling: Names of `TOKEN_POOLINGS`, joined by `+`; their vectors are joined in that order.
        skip: Tokens at the head of each sequence that are left out, as those of a prompt.
    """
    chosen = [TOKEN_POOLINGS[name] for name in pooling.split("+")]
    return torch.cat(
        [
            torch.cat([pool(run.float(), min(skip, run.shape[1] - 1)) for pool in chosen], dim=-1)
            for run in split_runs(states, runs)
        ]
    )


def _weighted_mean(run: Tensor, skip: int) -> Tensor:
    """Return the mean of tokens weighted by their places from 1 on (SGPT, arXiv:2202.08904)."""
    weights = torch.arange(1, run.shape[1] + 1, device=run.device, dtype=run.dtype)[skip:, None]
    return (run[:, skip:] * weights).sum(1) / weights.sum()


TOKEN_POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda run, skip: run[:, skip:].mean(1),
    "cls": lambda run, skip: run[:, skip],
    "last": lambda run, _: run[:, -1],
    "max": lambda run, skip: run[:, skip:].amax(1),
    "weightedmean": _weighted_mean,
    "mean_sqrt_len": lambda run, skip: run[:, skip:].sum(1) / (run.shape[1] - skip) ** 0.5,
}
"""From (count, length, dim) and the tokens to skip to (count, dim)."""


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 key_heads tokens head_dim"],
    value: Float[Tensor, "1 key_heads tokens head_dim"],
    attention_mask: None,  # noqa: ARG001 - the signature is that of transformers
    **options: Any,
) -> tuple[Float[Tensor, "1 tokens heads head_dim"], None]:
    """Attend within each sequence of a packed row, as `AttentionInterface` asks for it.

    Args:
        module: The attention layer; says whether it is causal unless `is_causal` is given.
        query: Queries.
        key: Keys; fewer heads than the queries where they share them.
        value: Values.
        attention_mask: None: there is no padding.
        **options: `token_batch`, which went through the model's forward; `scaling`; `is_causal`.
    """
    batch: TokenBatch = options["token_batch"]
    is_causal = options.get("is_causal")
    is_causal = bool(module.is_causal) if is_causal is None else is_causal
    scale = options.get("scaling")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # tokens, heads, …
    attend = _attend_on_gpu if _has_varlen_kernel(query) else _attend_by_runs
    return attend((q, k, v), batch, scale, is_causal)[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _attend_on_gpu(
    inputs: QueriesKeysValues, batch: TokenBatch, scale: float | None, is_causal: bool
) -> Tensor:
    """Attend with torch's own variable-length kernel.

    That is FlashAttention 2, which splits the keys of a sequence only when it generates text: so a
    sequence's result does not depend on the others of its batch.
    """
    query, key, _ = inputs
    attended = varlen_attn(
        *inputs,
        batch.starts,
        batch.starts,
        batch.longest,
        batch.longest,
        scale=scale,
        window_size=(-1, 0) if is_causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, attended)  # with return_aux it would be a tuple


def _attend_by_runs(
    inputs: QueriesKeysValues, batch: TokenBatch, scale: float | None, is_causal: bool
) -> Tensor:
    """Attend once for each run of equal lengths, which needs no mask."""
    attended = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    runs = (split_runs(tensor, batch.runs) for tensor in (*inputs, attended))
    for *run, output in zip(*runs, strict=True):
        q, k, v = (tensor.transpose(1, 2) for tensor in run)  # count, heads, length, head_dim
        result = F.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        output.copy_(result.transpose(1, 2))
    return attended


def _has_varlen_kernel(tensor: Tensor) -> bool:
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and tensor.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )
