"""Frozen text encoders: any encoder or decoder of transformers, and NV-Embed, without padding."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from features.config import TextEncoderConfig
from features.device.memory import one_memory_error
from features.encoders.packing import TokenBatch, Tokens, batch_stop, pool_tokens
from features.encoders.plan import EncoderPlan
from features.errors import EncoderError

logger = logging.getLogger(__name__)
OUTPUTS = {"pooler": "pooler_output", "projection": "text_embeds"}


@runtime_checkable
class Tokenise(Protocol):
    """From captions to the token numbers of each."""

    @property
    def max_length(self) -> int:
        """Tokens kept of a caption."""

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the token numbers of each caption."""


def batch_budget(config: TextEncoderConfig, device: torch.device) -> int:
    """Return how many tokens a forward pass has at most."""
    return config.tokens_per_batch or (2048 if device.type == "cpu" else 16_384)


@dataclass(frozen=True)
class TextColumn:
    """One column that a text encoder fills: a part of the vectors that it gives."""

    name: str
    dim: int
    fingerprint: dict[str, Any]


@dataclass
class TextEncoder:
    """A frozen text model. Its workers call `tokenise`, its device `encode_tokens`."""

    name: str
    model: nn.Module
    """Takes a `TokenBatch`, gives one vector per sequence."""
    tokenise: Tokenise
    tokens_per_batch: int
    """Token budget of a forward pass; halved when the device runs out of memory."""
    equal_lengths: bool
    """Whether a batch must hold captions of one length, since the model cannot pack others."""
    first_position: int
    device: torch.device
    dim: int
    fingerprint: dict[str, Any]
    plan: EncoderPlan | None = None
    """How it is used, and which of its files says so."""
    also: tuple[TextColumn, ...] = ()
    """Further columns, whose parts of a vector follow that of its own column."""

    @property
    def columns(self) -> tuple[TextColumn, ...]:
        """The encoder's own column, then those of `also`."""
        own = self.dim - sum(column.dim for column in self.also)
        return (TextColumn(self.name, own, self.fingerprint), *self.also)

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What decides each column, by its name in the store; its fields share it."""
        return {f"text/{column.name}": column.fingerprint for column in self.columns}

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts feature_dim"]:
        """Return one vector per text, not normalised unless the model itself does it."""
        return self.encode_tokens(self.tokenise(texts))

    def cut(self, texts: Sequence[str], ids: Sequence[Tokens]) -> Bool[np.ndarray, "texts"]:
        """Return which texts have more tokens than are kept, where the tokenizer can tell.

        Args:
            texts: As they were given to `tokenise`.
            ids: What it returned.
        """
        is_cut, tell = np.zeros(len(texts), dtype=bool), getattr(self.tokenise, "cut", None)
        full = [i for i, each in enumerate(ids) if len(each) >= self.tokenise.max_length]
        if full and tell is not None:
            is_cut[full] = tell([texts[i] for i in full])
        return is_cut

    @torch.inference_mode()
    def encode_tokens(
        self, ids: Sequence[Tokens], on_texts: Callable[[int], None] = lambda _: None
    ) -> Float32[np.ndarray, "texts feature_dim"]:
        """Return one vector per token sequence, whatever their order; NaN for one without tokens.

        The longest come first, so that a batch too large for the device fails at once; then the
        budget halves, and the batch is tried again.

        Args:
            ids: Token numbers, from `tokenise`.
            on_texts: Called after each batch with the number of its texts.

        Raises:
            EncoderError: A single sequence is too much for the device.
        """
        order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: -len(ids[i]))
        if empty := len(ids) - len(order):
            logger.warning(
                "%d captions have no tokens by the tokenizer of %r: not finite", empty, self.name
            )
            on_texts(empty)
        lengths = [len(ids[i]) for i in order]
        encoded: list[Tensor] = []  # stays on the device, which so never waits for a copy
        start = 0
        while start < len(order):
            stop = batch_stop(
                lengths, start, self.tokens_per_batch, equal_lengths=self.equal_lengths
            )
            try:
                encoded.append(self._forward([ids[i] for i in order[start:stop]]))
            except torch.OutOfMemoryError as error:
                self._halve_budget(lengths[start:stop], error)
                continue
            on_texts(stop - start)
            start = stop
        features = np.full((len(ids), self.dim), np.nan, dtype=np.float32)
        if encoded:
            features[order] = torch.cat(encoded).cpu().numpy()
        return features

    @one_memory_error()
    def _forward(self, sequences: Sequence[Tokens]) -> Float32[Tensor, "sequences feature_dim"]:
        batch = TokenBatch.pack(sequences, self.device, first_position=self.first_position)
        vectors: Tensor = self.model(batch)
        return vectors

    def _halve_budget(self, lengths: Sequence[int], error: torch.OutOfMemoryError) -> None:
        tokens = sum(lengths)
        if len(lengths) == 1:
            raise EncoderError(
                f"One caption of {tokens} tokens is too much for the memory of {self.device} with "
                f"the text encoder {self.name!r}. Room for the longest caption was expected. Lower "
                f"max_length, or use a larger device."
            ) from error
        self.tokens_per_batch = tokens // 2
        logger.warning(
            "%s ran out of memory on %d tokens of %r: going on with %d tokens a batch",
            self.device,
            tokens,
            self.name,
            self.tokens_per_batch,
        )


@dataclass(frozen=True)
class PooledUse:
    """What is made of the tokens of a text model."""

    pooling: str
    """As in `TextEncoderConfig`, but `auto`."""
    skip: int = 0
    """Tokens at the head of a sequence that are not pooled."""
    layer: int = -1
    """Which of the model's `hidden_states` is pooled; -1 is its `last_hidden_state`."""
    dim: int | None = None
    """How much of the vector is kept; all if not given."""
    normalise: bool = False
    """Whether what is kept is scaled to length 1."""


class PooledModel(nn.Module):
    """A model of transformers and what makes one vector of its tokens.

    Args:
        model: Takes token numbers, gives `last_hidden_state`.
        *uses: What is made of its tokens, for each column.
        is_packed: Whether its attention is `PACKED_ATTENTION`; if not, the sequences of a batch
            must have one length, and so need no mask.
        behind: What follows the pooling, such as Dense layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *uses: PooledUse,
        is_packed: bool,
        behind: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.uses = uses
        self.is_packed = is_packed
        self.behind = behind

    def forward(self, batch: TokenBatch) -> Float32[Tensor, "sequences feature_dim"]:
        """Return one vector per sequence: those of all uses, one behind the other.

        Raises:
            EncoderError: The model has no pooler or layer and it was asked for.
        """
        return torch.cat(self.vectors(batch), dim=-1)

    def vectors(self, batch: TokenBatch) -> list[Float32[Tensor, "sequences _"]]:
        """Return one vector per sequence for each use, as `forward` does."""
        options: dict[str, Any] = {}
        if any(use.layer != -1 for use in self.uses):
            options["output_hidden_states"] = True
        if self.is_packed:
            output = self.model(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                token_batch=batch,
                **options,
            )
        else:
            output = self.model(input_ids=batch.ids.view(-1, batch.longest), **options)
        return [self._vectors(output, batch, use) for use in self.uses]

    def _vectors(self, output: Any, batch: TokenBatch, use: PooledUse) -> Tensor:
        vectors = self._pooled(output, batch, use)
        if self.behind is not None:
            vectors = self.behind(vectors)
        vectors = vectors if use.dim is None else vectors[:, : use.dim]
        return F.normalize(vectors, dim=-1) if use.normalise else vectors

    def _pooled(self, output: Any, batch: TokenBatch, use: PooledUse) -> Tensor:
        if use.pooling in OUTPUTS:
            return self._own_output(output, use.pooling)
        states = output.last_hidden_state
        if use.layer != -1:
            layers = output.hidden_states or ()
            if not -len(layers) <= use.layer < len(layers):
                raise EncoderError(
                    f"{type(self.model).__name__} has no layer {use.layer}. {-len(layers)} to "
                    f"{len(layers) - 1} was expected. Correct `layer`."
                )
            states = layers[use.layer].to(batch.ids.device)  # of several devices, maybe another
        return pool_tokens(states.flatten(0, 1), batch.runs, use.pooling, skip=use.skip)

    def _own_output(self, output: Any, pooling: str) -> Tensor:
        found: Tensor | None = getattr(output, OUTPUTS[pooling], None)
        if found is None:
            raise EncoderError(
                f"{type(self.model).__name__} has no {pooling}, so pooling "
                f"{pooling!r} is not there. Use `mean`, `cls` or `last`."
            )
        return found.float()
