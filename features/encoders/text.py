"""Frozen text encoders: any encoder or decoder of transformers, with an explicit pooling."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from features.config import TextEncoderConfig
from features.encoders.checkpoint import (
    compute_dtype,
    find_encoder,
    load_weights,
    read_config,
    versions,
)
from features.errors import EncoderError

Tokens = list[int]
CHARACTERS_PER_TOKEN = 16  # more than tokens mostly have


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text model. Its workers call `tokenise`, its device `encode_tokens`."""

    name: str
    model: nn.Module
    tokenizer: Any
    pooling: str
    instruction: str
    max_length: int
    tokens_per_batch: int
    device: torch.device
    dtype: torch.dtype
    dim: int
    fingerprint: dict[str, Any]

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts feature_dim"]:
        """Return one vector per text, not normalised."""
        return self.encode_tokens(self.tokenise(texts))

    def tokenise(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the token numbers of each text, special tokens included, cut at max_length.

        Of a long text only as much is read as `max_length` tokens may take, so that one caption of
        a megabyte does not cost a hundred.
        """
        whole = [self.instruction + text for text in texts]
        return self._tokenise_beginnings(whole, self.max_length * CHARACTERS_PER_TOKEN)

    def _tokenise_beginnings(self, texts: Sequence[str], characters: int) -> list[Tokens]:
        beginnings = [_beginning(text, characters) for text in texts]
        encoded = self.tokenizer(
            beginnings,
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[Tokens] = encoded["input_ids"]
        for i, tokens in enumerate(ids):
            if len(tokens) < self.max_length and len(beginnings[i]) < len(texts[i]):
                (ids[i],) = self._tokenise_beginnings(texts[i : i + 1], 8 * characters)
        return ids

    @torch.inference_mode()
    def encode_tokens(
        self, ids: Sequence[Tokens], on_texts: Callable[[int], None] = lambda _: None
    ) -> Float32[np.ndarray, "texts feature_dim"]:
        """Return one vector per token sequence, whatever their order.

        Sequences of like length share a batch, so that little padding is computed.

        Args:
            ids: Token numbers, from `tokenise`.
            on_texts: Called after each batch with the number of its texts.
        """
        features = np.empty((len(ids), self.dim), dtype=np.float32)
        for batch in token_batches([len(sequence) for sequence in ids], self.tokens_per_batch):
            input_ids, mask = self._pad([ids[i] for i in batch])
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = self.model(input_ids=input_ids, attention_mask=mask.long())
            features[batch] = pool_text(output, mask, self.pooling).float().cpu().numpy()
            on_texts(len(batch))
        return features

    def _pad(
        self, ids: Sequence[Tokens]
    ) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        length = max(len(sequence) for sequence in ids)
        padded = np.full((len(ids), length), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(ids), length), dtype=bool)
        for i, sequence in enumerate(ids):
            padded[i, : len(sequence)] = sequence
            mask[i, : len(sequence)] = True
        return torch.from_numpy(padded).to(self.device), torch.from_numpy(mask).to(self.device)


def load_text_encoder(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Load a frozen text encoder, ready to encode.

    Raises:
        EncoderError: It cannot be found or loaded, or has no such pooling.
    """
    files = find_encoder(config.model, config.revision)
    model_config = read_config(files.folder)
    if getattr(model_config, "is_encoder_decoder", False):
        raise EncoderError(
            f"{config.model} is an encoder–decoder ({model_config.model_type}). An encoder or a "
            f"decoder was expected. Choose another text encoder."
        )
    model = load_weights(
        AutoModel,
        files.folder,
        optional="^$" if config.pooling == "pooler" else r"(^|\.)pooler\.",
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)
    dtype = compute_dtype(config.precision, device)
    dim = int(model_config.hidden_size)
    fingerprint = files.fingerprint() | {
        "pooling": config.pooling,
        "instruction": config.instruction,
        "max_length": config.max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "dim": dim,
        "versions": versions("torch", "transformers", "tokenizers"),
    }
    return TextEncoder(
        name=name,
        model=model,
        tokenizer=tokenizer,
        pooling=config.pooling,
        instruction=config.instruction,
        max_length=config.max_length,
        tokens_per_batch=config.tokens_per_batch or (1024 if device.type == "cpu" else 16_384),
        device=device,
        dtype=dtype,
        dim=dim,
        fingerprint=fingerprint,
    )


def token_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield the positions of sequences that share a batch, longest first.

    A batch holds at most `tokens_per_batch` tokens after padding, or one sequence. The longest
    come first, so that a batch too large for the device fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(lengths[order[start]], 1))
        yield order[start : start + size]
        start += size


def pool_text(
    output: Any, mask: Bool[Tensor, "batch length"], pooling: str
) -> Float[Tensor, "batch feature_dim"]:
    """Make one vector of the tokens of each sequence; padding stands on the right.

    Raises:
        EncoderError: The model has no pooler and it was asked for.
    """
    if pooling == "pooler":
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            raise EncoderError(
                f"{type(output).__name__} has no pooler output, so pooling 'pooler' is not there. "
                f"Use `mean`, `cls` or `last`."
            )
        return pooled
    tokens: Tensor = output.last_hidden_state
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "last":
        return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1)


def _beginning(text: str, characters: int) -> str:
    """Return the first words of a text; all of it where no space says how to cut it."""
    end = text.rfind(" ", 1, characters) if len(text) > characters else -1
    return text if end < 0 else text[:end].rstrip(" ")
