"""Folders of sentence-transformers by their name alone: as that library encodes, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from features.errors import EncoderError
from tests.conformance.sentences import (
    change,
    check_equal,
    dense,
    loaded,
    sentence_folder,
    trunk,
)


def layers(*names: str) -> Callable[[int], list[Any]]:
    """Return what makes modules behind a pooling."""

    def make(dim: int) -> list[Any]:
        from sentence_transformers.sentence_transformer import modules

        made: dict[str, Callable[[], Any]] = {
            "tanh": lambda: dense(dim, 6, nn.Tanh()),
            "wider": lambda: dense(dim, 20, bias=False),
            "back": lambda: dense(20, dim),
            "residual": lambda: dense(dim, dim, nn.GELU(), use_residual=True),
            "norm": lambda: modules.LayerNorm(dim),
            "unit": modules.Normalize,
        }
        return [made[name]() for name in names]

    return make


@pytest.mark.parametrize(
    ("pooling", "behind"),
    [
        ("cls", ("unit",)),
        ("max", ()),
        ("lasttoken", ()),
        ("weightedmean", ()),
        ("mean_sqrt_len_tokens", ()),
        (("cls", "mean"), ()),
        ("cls", ("tanh", "unit")),  # LaBSE
        ("mean", ("wider", "back", "unit")),  # EmbeddingGemma
        ("mean", ("unit", "residual")),
        ("mean", ("norm", "tanh")),
    ],
)
def test_pooling_and_what_follows_it_are_as_the_files_say(
    tmp_path: Path, pooling: str | tuple[str, ...], behind: tuple[str, ...]
) -> None:
    folder = sentence_folder(tmp_path / "st", pooling, layers(*behind))
    encoder = check_equal(folder)
    assert encoder.plan is not None
    assert encoder.plan.decisions["pooling"].source == "1_Pooling/config.json"
    assert "1_Pooling/config.json" in encoder.fingerprint["files"]


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "max", "cls"])
def test_the_default_prompt_is_put_before_every_text(
    tmp_path: Path, include_prompt: bool, pooling: str
) -> None:
    prompts = {"query": "the small star of ", "document": ""}
    folder = sentence_folder(
        tmp_path / "st",
        pooling,
        include_prompt=include_prompt,
        prompts=prompts,
        default_prompt_name="query",
    )
    encoder = check_equal(folder)
    assert encoder.fingerprint["instruction"] == prompts["query"]
    assert encoder.fingerprint.get("include_prompt", True) is include_prompt
    named = loaded(folder, prompt="document")
    assert named.fingerprint["instruction"] == ""
    with pytest.raises(EncoderError, match=r"has the prompts .*'query'"):
        loaded(folder, prompt="passage")


def test_length_and_case_of_the_transformer_module_are_followed(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "st", model_type="bert")
    change(folder / "sentence_bert_config.json", max_seq_length=9, do_lower_case=True)
    encoder = check_equal(folder)
    assert encoder.fingerprint["max_length"] == 9
    assert encoder.fingerprint["lower_case"] is True


@pytest.mark.parametrize("lower", [True, False])
def test_the_case_of_tokenizer_config_is_followed(tmp_path: Path, lower: bool) -> None:
    from transformers import BertTokenizer

    folder = sentence_folder(tmp_path / "st")
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    capital = words | {"The": len(words), "Green": len(words) + 1, "BLUE": len(words) + 2}
    change(folder / "config.json", vocab_size=len(words))
    for path in folder.glob("*token*"):
        path.unlink()
    BertTokenizer(vocab=capital if not lower else words, do_lower_case=lower).save_pretrained(
        folder
    )
    if not lower:
        _grow(folder, len(capital))
    check_equal(folder)


def _grow(folder: Path, words: int) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model.resize_token_embeddings(words)
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "mpnet", "qwen3", "llama"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
def test_other_trunks_are_pooled_as_the_files_say(
    tmp_path: Path, model_type: str, pooling: str
) -> None:
    folder = sentence_folder(tmp_path / "st", pooling, model_type=model_type)
    change(folder / "sentence_bert_config.json", max_seq_length=100)  # else it fails beyond 198
    check_equal(folder)


def test_the_old_layout_with_a_folder_for_the_transformer_is_read(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "st", "cls")
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in [each for each in folder.iterdir() if each.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(inside / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    encoder = check_equal(folder)
    assert "0_Transformer/tokenizer.json" in encoder.fingerprint["files"]


@pytest.mark.parametrize(
    "kind",
    ["sentence_transformers.models.CNN", "custom_st.Transformer", "sentence_transformers.Router"],
)
def test_a_module_that_is_not_known_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    folder = trunk(tmp_path / "st")
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    second = {"idx": 1, "name": "1", "path": "1", "type": kind}
    (folder / "modules.json").write_text(json.dumps([first, second]))
    with pytest.raises(EncoderError, match=f"has a module '{kind}', which is not known here"):
        loaded(folder)


def test_a_recipe_that_contradicts_the_files_is_followed_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = sentence_folder(tmp_path / "st", "cls")
    change(folder / "sentence_bert_config.json", max_seq_length=9)
    encoder = loaded(folder, pooling="mean", max_length=20)
    assert encoder.fingerprint["pooling"] == "mean"
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "pooling = mean in the recipe, cls in 1_Pooling/config.json" in warning
    assert "max_length = 20 in the recipe, 9 in sentence_bert_config.json" in warning
    caplog.clear()
    loaded(folder, pooling="cls", max_length=5)  # shorter contradicts nothing
    assert not caplog.records


def test_a_language_model_of_which_no_file_says_the_pooling_is_refused(tmp_path: Path) -> None:
    folder = trunk(tmp_path / "llama", "llama")
    with pytest.raises(EncoderError, match=r"No file .* llama, .* Set `pooling` .*`last`"):
        loaded(folder)
    assert loaded(folder, pooling="last").fingerprint["pooling"] == "last"
