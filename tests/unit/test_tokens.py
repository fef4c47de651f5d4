"""What stands around a caption when it becomes token numbers."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.encoders.tokenizer import CaptionTokenizer, adds_end, read_tokenizer
from features.errors import EncoderError
from tests import text_models, tiny

BOS, EOS, SPACE = 1, 2, 3
A = text_models.LETTERS.index("a")


def last_token_encoder(
    folder: Path, max_length: int, end_token: bool | Literal["auto"] = "auto"
) -> TextEncoder:
    config = TextEncoderConfig(
        model=str(folder), pooling="last", max_length=max_length, end_token=end_token
    )
    return load_text_encoder("tiny", config, torch.device("cpu"))


def test_the_tokenizer_file_is_followed_to_the_last_space(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(text_models.llama_tokenizer(tmp_path))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a", "  a  a ", " ", "a</s> a", ""):
        assert tokenizer(text)["input_ids"] == expected.encode(text).ids


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    config = TextEncoderConfig(model=str(tiny.image_encoder(tmp_path)))
    with pytest.raises(EncoderError, match=r"has no tokenizer\.json, and no other"):
        load_text_encoder("tiny", config, torch.device("cpu"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = text_models.llama_tokenizer(tmp_path)
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match=rf"{name} cannot be read: .* Fetch it again"):
        read_tokenizer(folder)


def test_a_last_token_embedder_reads_the_end_token_even_of_a_caption_that_is_cut(
    tmp_path: Path,
) -> None:
    folder = text_models.transformers_model(tmp_path, "qwen3")
    encoder = last_token_encoder(folder, max_length=6, end_token=True)
    ids = encoder.tokenise(["a", "aaaaaaaaaaaa"])
    assert ids == [[BOS, SPACE, A, EOS], [BOS, SPACE, A, A, A, EOS]]
    expected = torch.stack([text_models.plain_states(folder, tokens)[-1] for tokens in ids])
    np.testing.assert_allclose(encoder.encode_tokens(ids), expected, atol=2e-6)
    assert encoder.fingerprint["end_token"] == EOS


def test_an_end_token_is_put_where_the_recipe_or_the_files_ask_for_it_and_nowhere_else(
    tmp_path: Path,
) -> None:
    folder = text_models.transformers_model(tmp_path, "qwen3")
    encoder = last_token_encoder(folder, max_length=6)
    assert encoder.tokenise(["a"]) == [[BOS, SPACE, A]]
    assert "end_token" not in encoder.fingerprint
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_eos_token": True}))
    encoder = last_token_encoder(folder, max_length=6)
    assert encoder.tokenise(["a"]) == [[BOS, SPACE, A, EOS]]
    assert encoder.plan is not None
    assert encoder.plan.decisions["end_token"].source == "add_eos_token in tokenizer_config.json"
    assert last_token_encoder(folder, 6, end_token=False).tokenise(["a"]) == [[BOS, SPACE, A]]


def test_no_second_end_token_is_put_where_the_tokenizer_has_one(tmp_path: Path) -> None:
    folder = text_models.transformers_model(tmp_path, "qwen3")
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    tokenizer.save(str(path))
    assert adds_end(read_tokenizer(folder))
    encoder = last_token_encoder(folder, max_length=4)
    assert encoder.tokenise(["a", "aaaaaaaa"]) == [[SPACE, A, EOS], [SPACE, A, A, EOS]]
    assert "end_token" not in encoder.fingerprint


def test_cutting_in_the_tokenizer_file_itself_is_overruled(tmp_path: Path) -> None:
    path = text_models.llama_tokenizer(tmp_path) / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(settings))
    tokenise = CaptionTokenizer(read_tokenizer(tmp_path), max_length=8)
    assert [len(tokens) for tokens in tokenise(["aaaa", "a" * 20])] == [6, 8]


def test_of_a_long_caption_with_text_around_it_no_token_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = read_tokenizer(text_models.llama_tokenizer(tmp_path))
    captions = ["a b " * 30, "ab" * 30, "a", "", "a b c d e f g h " * 4 + "x" * 50]
    tokenise = CaptionTokenizer(tokenizer, 24, instruction="Query: ", suffix="</s>")
    expected = [tokenizer(f"Query: {caption}</s>")["input_ids"][:24] for caption in captions]
    for characters in (1, 2, 16):
        monkeypatch.setattr("features.encoders.tokenizer.CHARACTERS_PER_TOKEN", characters)
        assert tokenise(captions) == expected
        assert tokenise.cut(captions) == [True, True, False, False, True]
        assert tokenise.cut([captions[0][: 2 * n] for n in range(15)]) == [
            len(tokenizer(f"Query: {captions[0][: 2 * n]}</s>")["input_ids"]) > 24
            for n in range(15)
        ]
