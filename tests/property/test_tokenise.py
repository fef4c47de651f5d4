"""Reading only the beginning of long captions changes no token."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from features.encoders.tokenizer import CaptionTokenizer, read_tokenizer
from tests import tiny

WORDS = st.sampled_from(
    ["a", "red", "circle", "left of", "é", "🟥", "x" * 90, "  ", "\n", "no-word"]
)
TEXTS = st.builds(
    lambda words, times, space: space.join(words) * times,
    st.lists(WORDS, min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([" ", "  ", ""]),
)


@pytest.fixture(scope="module", params=["words", "bytes"])
def tokenise(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CaptionTokenizer:
    """Keeps 6 tokens of a caption, of a word or a byte-pair vocabulary."""
    folder = tiny.text_encoder(tmp_path_factory.mktemp("bert"))
    if request.param == "bytes":
        byte_pair_tokenizer().save_pretrained(folder)
    return CaptionTokenizer(read_tokenizer(folder), 6)


def byte_pair_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([tiny.caption(seed) for seed in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_long_captions_have_the_tokens_of_their_whole_text(
    tokenise: CaptionTokenizer, texts: list[str]
) -> None:
    whole = tokenise.tokenizer(texts, truncation=True, max_length=6)["input_ids"]
    assert tokenise(texts) == whole
    with pytest.MonkeyPatch.context() as patch:  # so that the cut is often near the last token
        patch.setattr("features.encoders.tokenizer.CHARACTERS_PER_TOKEN", 2)
        assert tokenise(texts) == whole


def test_a_long_caption_is_not_read_to_its_end(tokenise: CaptionTokenizer) -> None:
    read: list[int] = []

    def tokenizer(texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        read.extend(map(len, texts))
        found: dict[str, list[list[int]]] = tokenise.tokenizer(texts, **options)
        return found

    replace(tokenise, tokenizer=tokenizer)(["a red circle " * 80_000])
    assert sum(read) < 200
