"""Tokenizers of text encoders: what tokenizer.json says, and what is put around a caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from features.encoders.checkpoint import first_line, read_json
from features.encoders.packing import Tokens
from features.errors import EncoderError

TOKENIZER_SETTINGS = "tokenizer_config.json"
FILES = ("tokenizer.json", TOKENIZER_SETTINGS)
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "*.txt", "*.model")
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
    vocabulary: int | None = None
    """Numbers of tokens that the model knows; a caption with another has none at all."""
    padding: int | None = None
    """Token that every caption is filled up with to `max_length`; None where none is."""

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the token numbers of each caption.

        Of a long caption only as much is read as `max_length` tokens may take, so that one of a
        megabyte does not cost a hundred.
        """
        texts = [self.instruction + caption + self.suffix for caption in captions]
        ids = self._read_beginnings(texts, self.max_length * CHARACTERS_PER_TOKEN)
        if (most := self.vocabulary) is not None:
            ids = [tokens if max(tokens, default=-1) < most else [] for tokens in ids]
        if self.end is not None:
            ids = [[*tokens, self.end] if tokens else [] for tokens in ids]
        if self.padding is not None:
            ids = [tokens + [self.padding] * (self.max_length - len(tokens)) for tokens in ids]
        return ids

    def cut(self, captions: Sequence[str]) -> list[bool]:
        """Return which captions have more tokens than are kept of them."""
        kept, characters = self.max_length - (self.end is not None), 0
        cut = [False] * len(captions)
        left = list(range(len(captions)))
        while left:
            characters = 8 * characters or self.max_length * CHARACTERS_PER_TOKEN
            texts = [self.instruction + captions[i] + self.suffix for i in left]
            beginnings = [_beginning(text, characters) for text in texts]
            counts = map(len, self.tokenizer(beginnings, truncation=False)["input_ids"])
            is_whole = [len(one) == len(all_) for one, all_ in zip(beginnings, texts, strict=True)]
            over = [count > kept for count in counts]
            for i, is_over in zip(left, over, strict=True):
                cut[i] = is_over
            left = [i for i, *done in zip(left, over, is_whole, strict=True) if not any(done)]
        return cut

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
    settings = folder / TOKENIZER_SETTINGS
    named = read_json(settings) if settings.is_file() else {}
    special = {
        name: _content(named[name])
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token")
        if named.get(name)
    }
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    except Exception as error:
        raise EncoderError(
            f"{path} cannot be used: {first_line(error)} A tokenizer of the library tokenizers was "
            f"expected. Fetch it again from where the weights came from."
        ) from error


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files that decide what tokens a text becomes, by their names."""
    patterns = FILES if (folder / FILES[0]).is_file() else (*FILES, *OTHER_FILES)
    return {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern))}


def adds_end(tokenizer: Any) -> bool:
    """Return whether a tokenizer itself ends every text by a token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return bool(whole[len(whole) - len(plain) :] != plain)


def set_case(tokenizer: Any, *, lower: bool) -> bool:
    """Let a tokenizer turn texts to lower case before all else, or no longer do so.

    Returns:
        Whether that is another than its tokenizer.json says.

    Raises:
        EncoderError: It is none that can be told to.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if getattr(tokenizer, "do_lower_case", None) is lower:
            return False
        raise EncoderError(
            f"{type(tokenizer).__name__} cannot be told to use lower case ({lower}). A tokenizer "
            f"with a tokenizer.json was expected. Choose another model."
        )
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        changes = normalizer.lowercase is not lower
        normalizer.lowercase = lower
    else:
        changes = lower and "Lowercase" not in repr(normalizer)
        first = [normalizers.Lowercase()]
        normalizer = normalizers.Sequence(first + ([normalizer] if normalizer else []))
    if changes:
        backend.normalizer = normalizer
    return changes


def canonicalise(tokenizer: Any) -> None:
    """Let a tokenizer leave out punctuation and double spaces, as SigLIP's own does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    own = backend.normalizer
    first = [
        normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    backend.normalizer = normalizers.Sequence(first + ([own] if own else []))


def _other_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
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
