"""Captions to token numbers, as the checkpoint's own tokenizer file says."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from features.encoders.packing import Tokens
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
    _read_json(path)  # of a damaged one the library would tell by a plain Exception
    settings = folder / "tokenizer_config.json"
    named = _read_json(settings) if settings.is_file() else {}
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise EncoderError(
            f"{path} cannot be read: {error}. A whole JSON file was expected. Fetch it again from "
            f"where the weights came from."
        ) from error


def _content(token: str | dict[str, Any]) -> str:
    return str(token["content"]) if isinstance(token, dict) else token


def _beginning(text: str, characters: int) -> str:
    """Return the first words of a text; all of it where no space says how to cut it."""
    end = text.rfind(" ", 1, characters) if len(text) > characters else -1
    return text if end < 0 else text[:end].rstrip(" ")
