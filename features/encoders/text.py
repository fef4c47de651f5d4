"""Frozen text encoders: any encoder or decoder of transformers, and NV-Embed, without padding."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from features.encoders.checkpoint import read_json
from features.encoders.packing import TokenBatch, Tokens, batch_stop, pool_tokens
from features.errors import EncoderError

CHARACTERS_PER_TOKEN = 16  # more than tokens mostly have


@dataclass(frozen=True)
class CaptionTokenizer:
    """A tokenizer, and what a text encoder wants around each caption."""

    tokenizer: Any
    max_length: int
    """Tokens kept, special tokens included."""
    instruction: str = ""
    """Put before every caption."""
    suffix: str = ""
    """Put behind every caption before it is cut at `max_length`, so that a long one loses it."""
    end: int | None = None
    """Token put behind what is left after cutting, so that no caption loses it."""

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the token numbers of each caption.

        Of a long caption only as much is read as `max_length` tokens may take, so that one of a
        megabyte does not cost a hundred.
        """
        texts = [self.instruction + caption + self.suffix for caption in captions]
        ids = self._read_beginnings(texts, self.max_length * CHARACTERS_PER_TOKEN)
        return ids if self.end is None else [[*tokens, self.end] for tokens in ids]

    def _read_beginnings(self, texts: Sequence[str], characters: int) -> list[Tokens]:
        beginnings = [_beginning(text, characters) for text in texts]
        kept = self.max_length - (self.end is not None)
        encoded = self.tokenizer(
            beginnings,
            truncation=True,
            max_length=kept,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[Tokens] = encoded["input_ids"]
        for i, tokens in enumerate(ids):
            if len(tokens) < kept and len(beginnings[i]) < len(texts[i]):
                (ids[i],) = self._read_beginnings(texts[i : i + 1], 8 * characters)
        return ids


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint: what its tokenizer.json says, where it has one.

    AutoTokenizer builds a Llama tokenizer anew and drops the normaliser in that file, which gives
    other numbers for texts with leading or double spaces (transformers 5.23).

    Raises:
        EncoderError: It has no tokenizer, as an encoder of images, or a damaged one.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _other_tokenizer(folder)
    read_json(path)  # of a damaged one the library would tell by a plain Exception
    settings = folder / "tokenizer_config.json"
    named = read_json(settings) if settings.is_file() else {}
    special = {
        name: _content(named[name])
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token")
        if named.get(name)
    }
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)


def end_token(tokenizer: Any) -> int | None:
    """Return the end token that a last-token pooling needs and the tokenizer does not add itself.

    Embedders that pool their last token were trained with an end token there. Some tokenizers add
    it (Qwen3-Embedding), others leave it to the caller (e5-mistral as first published).
    """
    last = tokenizer("a")["input_ids"][-1]
    if last in tokenizer.all_special_ids:
        return None
    end: int | None = tokenizer.eos_token_id
    return end


def _other_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise EncoderError(
            f"{folder} has no tokenizer.json, and no other tokenizer can be made of it ({reason}). "
            f"A text encoder with its tokenizer was expected. Fetch the file from where the "
            f"weights came from, or choose another model."
        ) from error


def _content(token: str | dict[str, Any]) -> str:
    return str(token["content"]) if isinstance(token, dict) else token


def _beginning(text: str, characters: int) -> str:
    """Return the first words of a text; all of it where no space says how to cut it."""
    end = text.rfind(" ", 1, characters) if len(text) > characters else -1
    return text if end < 0 else text[:end].rstrip(" ")


logger = logging.getLogger(__name__)


@dataclass
class TextEncoder:
    """A frozen text model. Its workers call `tokenise`, its device `encode_tokens`."""

    name: str
    model: nn.Module
    """Takes a `TokenBatch`, gives one vector per sequence."""
    tokenise: CaptionTokenizer
    tokens_per_batch: int
    """Token budget of a forward pass; halved when the device runs out of memory."""
    equal_lengths: bool
    """Whether a batch must hold captions of one length, since the model cannot pack others."""
    first_position: int
    device: torch.device
    dim: int
    fingerprint: dict[str, Any]

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """The fingerprint, by the encoder's name in the store; its fields share it."""
        return {f"text/{self.name}": self.fingerprint}

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts feature_dim"]:
        """Return one vector per text, not normalised unless the model itself does it."""
        return self.encode_tokens(self.tokenise(texts))

    @torch.inference_mode()
    def encode_tokens(
        self, ids: Sequence[Tokens], on_texts: Callable[[int], None] = lambda _: None
    ) -> Float32[np.ndarray, "texts feature_dim"]:
        """Return one vector per token sequence, whatever their order.

        The longest come first, so that a batch too large for the device fails at once; then the
        budget halves, and the batch is tried again.

        Args:
            ids: Token numbers, from `tokenise`.
            on_texts: Called after each batch with the number of its texts.

        Raises:
            EncoderError: A single sequence is too much for the device.
        """
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
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
        features = np.empty((len(ids), self.dim), dtype=np.float32)
        if encoded:
            features[order] = torch.cat(encoded).cpu().numpy()
        return features

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


class PooledModel(nn.Module):
    """A model of transformers and what makes one vector of its tokens.

    Args:
        model: Takes token numbers, gives `last_hidden_state`.
        pooling: As in `TextEncoderConfig`.
        is_packed: Whether its attention is `PACKED_ATTENTION`; if not, the sequences of a batch
            must have one length, and so need no mask.
    """

    def __init__(self, model: nn.Module, pooling: str, *, is_packed: bool) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.is_packed = is_packed

    def forward(self, batch: TokenBatch) -> Float32[Tensor, "sequences feature_dim"]:
        """Return one vector per sequence.

        Raises:
            EncoderError: The model has no pooler and it was asked for.
        """
        if self.is_packed:
            output = self.model(
                input_ids=batch.ids[None], position_ids=batch.positions[None], token_batch=batch
            )
        else:
            output = self.model(input_ids=batch.ids.view(-1, batch.longest))
        if self.pooling == "pooler":
            return self._pooler_output(output)
        return pool_tokens(output.last_hidden_state.flatten(0, 1), batch.runs, self.pooling)

    def _pooler_output(self, output: Any) -> Tensor:
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            raise EncoderError(
                f"{type(self.model).__name__} has no pooler, so pooling 'pooler' is not there. Use "
                f"`mean`, `cls` or `last`."
            )
        return pooled.float()
