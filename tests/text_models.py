"""Tiny text encoders of random weights, of the real transformers classes and of NV-Embed."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from features.encoders.nvembed import NVEmbed, _hub_name

LETTERS = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *string.digits, *".,:!?'\n"]
SMALL: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
# By model type: the class and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", SMALL),
    "roberta": ("RobertaModel", SMALL | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaModel", SMALL | {"pad_token_id": 1}),
    "gte": ("GteModel", SMALL),
    "mistral": ("MistralModel", GROUPED),
    "llama": ("LlamaModel", GROUPED),
    "qwen2": ("Qwen2Model", GROUPED),
    "qwen3": ("Qwen3Model", GROUPED),
    "mpnet": ("MPNetModel", SMALL | {"pad_token_id": 1}),
}
NVEMBED: dict[str, Any] = {
    "model_type": "nvembed",
    "padding_side": "right",
    "is_mask_instruction": True,
    "text_config": GROUPED | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4},
    "latent_attention_config": {
        "num_latents_value": 6,
        "latent_dim": 32,
        "hidden_dim": 32,
        "num_cross_heads": 2,
        "cross_dim_head": 24,
    },
}


def transformers_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """Write a model of a type in `MODELS`, and a tokenizer that adds `<s>` and no `</s>`."""
    name, small = MODELS[model_type]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**(small | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    llama_tokenizer(folder)
    return folder


def nvembed(folder: Path, *, shards: int = 1, **settings: Any) -> Path:
    """Write an NV-Embed in the hub's layout, its weights in some shards."""
    folder.mkdir(parents=True, exist_ok=True)
    config = NVEMBED | settings
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NVEmbed(config)
        weights = {
            _hub_name(name): torch.randn_like(weight) * 0.3
            for name, weight in model.named_parameters()
        }
    names = np.array_split(np.array(sorted(weights)), shards)
    for number, part in enumerate(names, start=1):
        place = folder / f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): weights[str(name)] for name in part}, place)
    llama_tokenizer(folder)
    return folder


def any_model(folder: Path, model_type: str) -> Path:
    """Write an NV-Embed, or a model of a type in `MODELS`."""
    return nvembed(folder) if model_type == "nvembed" else transformers_model(folder, model_type)


def llama_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of letters with the normaliser of Llama's: a space in front of all."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def plain_states(folder: Path, tokens: list[int]) -> torch.Tensor:
    """What transformers makes of one sequence on its own, called the ordinary way."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        states: torch.Tensor = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return states


def sequences(count: int, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Token sequences of varied length, special tokens left out."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, size=count)
    return [random.integers(3, 60, size=int(length)).tolist() for length in lengths]
