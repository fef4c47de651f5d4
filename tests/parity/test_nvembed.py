"""NV-Embed against the outputs of its reference implementation, from shared/."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.encoders.nvembed import NVEmbed, load_nvembed
from features.encoders.packing import TokenBatch
from features.encoders.tokenizer import CaptionTokenizer, read_tokenizer

GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "nvembed_tiny"
pytestmark = pytest.mark.skipif(
    not GOLDENS.is_dir(), reason="the goldens lie in shared/, beside the checkout; they are absent"
)
CPU = torch.device("cpu")
ID_CASES = ["nopad", "rightpad", "rightpad_instr4", "leftpad", "long", "single"]
TEXT_CASES = ["text_plain", "text_instr", "text_instr_nospace", "text_trunc"]


@functools.cache
def cases() -> dict[str, Tensor]:
    return load_file(GOLDENS / "cases.safetensors")


def golden(case: str, *, output_normalize: bool = True) -> tuple[NVEmbed, TokenBatch, Tensor]:
    """The model, the real tokens of a case, and which places of its arrays these are."""
    config: dict[str, Any] = json.loads((GOLDENS / "config.json").read_text())
    config["latent_attention_config"]["output_normalize"] = output_normalize
    mask, pooled = cases()[f"{case}.attention_mask"], cases()[f"{case}.pool_mask"]
    model = load_nvembed(
        GOLDENS,
        config,
        instruction_tokens=int((mask - pooled)[0].sum()),
        device=CPU,
        dtype=torch.float32,
    )
    ids = cases()[f"{case}.input_ids"]
    real = mask.bool()
    rows = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
    return model, TokenBatch.pack(rows, CPU), real


@pytest.mark.parametrize("case", ID_CASES + TEXT_CASES)
@torch.inference_mode()
def test_embeddings_equal_those_of_the_reference(case: str) -> None:
    model, batch, _ = golden(case)
    expected = cases()[f"{case}.sentence_embeddings"]
    torch.testing.assert_close(model(batch), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", ID_CASES)
@torch.inference_mode()
def test_embeddings_before_normalisation_equal_those_of_the_reference(case: str) -> None:
    model, batch, _ = golden(case, output_normalize=False)
    expected = cases()[f"{case}.pooled_unnormalized"]
    torch.testing.assert_close(model(batch), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ID_CASES)
@torch.inference_mode()
def test_every_token_equals_that_of_the_reference(case: str) -> None:
    model, batch, real = golden(case)
    states = model.trunk(
        input_ids=batch.ids[None], position_ids=batch.positions[None], token_batch=batch
    ).last_hidden_state[0]
    expected = cases()[f"{case}.last_hidden_state"][real]
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=0)
    expected = cases()[f"{case}.latent_tokens"][real]
    torch.testing.assert_close(model.latent(states), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", TEXT_CASES)
def test_texts_give_the_tokens_and_embeddings_of_the_reference(tmp_path: Path, case: str) -> None:
    record = json.loads((GOLDENS / "text_cases.json").read_text())[case]
    encoder = from_folder(tmp_path, record["instruction"], record["max_length"])
    assert isinstance(encoder.model, NVEmbed)
    assert encoder.model.instruction_tokens == record["instruction_lens"]
    expected_ids = [
        row[keep.bool()].tolist()
        for row, keep in zip(
            cases()[f"{case}.input_ids"], cases()[f"{case}.attention_mask"], strict=True
        )
    ]
    assert encoder.tokenise(record["texts"]) == expected_ids
    found = torch.from_numpy(encoder.encode(record["texts"]))
    expected = cases()[f"{case}.sentence_embeddings"]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="needs Mistral's tokenizer.model: pip install --no-deps mistral-common==1.13.1",
)
def test_the_80_records_of_the_real_tokenizer_are_reproduced(tmp_path: Path) -> None:
    tokenizer = mistral_tokenizer(tmp_path)
    records = json.loads((GOLDENS / "tokenization_mistral7b_v01.json").read_text())
    assert len(records) == 80
    for record in records:
        instruction = record["instruction"]
        tokenise = CaptionTokenizer(tokenizer, record["max_length"], instruction, suffix="</s>")
        assert tokenise([record["text"]]) == [record["input_ids"]], record
        count = len(tokenizer.tokenize(instruction)) if instruction else 0
        assert count == record["instruction_lens"], record


def from_folder(folder: Path, instruction: str, max_length: int) -> TextEncoder:
    """The encoder as a recipe makes it, of a folder in the hub's layout."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / name, folder / name)
    for path in (GOLDENS / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    config = TextEncoderConfig(
        model=str(folder), instruction=instruction, max_length=max_length, tokens_per_batch=30
    )
    return load_text_encoder("tiny", config, CPU)


def mistral_tokenizer(folder: Path) -> Any:
    """Build the tokenizer.json of Mistral-7B-v0.1 from its SentencePiece model, and read it."""
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    pieces = sentencepiece.ModelProto.FromString(path.read_bytes()).pieces
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
    merges = [
        (-piece.score, number, (piece.piece[:cut], piece.piece[cut:]))
        for number, piece in enumerate(pieces)
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in vocabulary and piece.piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [pair for *_, pair in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder)
