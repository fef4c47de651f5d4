"""`--to hf`: a folder in the manner of the hub, that loads without this program too.

    config.json         that of a checkpoint, and under `exported` how the encoders are used
    model.safetensors   the weights of both heads, scale and bias
    heads.py            what builds the heads; needs torch alone
    image_encoder/      of the frozen image encoder: its files, or only what describes it
    text_encoder/       of the frozen text encoder: the same
    README.md           the card

The names of the encoders' folders stand for them in config.json, as a hub id does.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from align import heads
from align.checkpoint import CONFIG, MODEL
from features.encoders.processors import read_image_processor
from features.encoders.towers import IMAGE_TOWERS
from features.images import BILINEAR, Preprocessing
from features.storage.files import write_json
from pipeline.card import TEMPLATES
from pipeline.export.parts import EncoderPart, Parts
from pipeline.python import EXPORTED, IMAGE, TEXT

TEXT_POOLINGS = {
    "mean": "last_hidden_state.mean(1)",
    "cls": "last_hidden_state[:, 0]",
    "last": "last_hidden_state[:, -1]",
    "pooler": "pooler_output",
}


def write(parts: Parts, folder: Path) -> str:
    """Write the files of the folder; return how it is used.

    Raises:
        EncoderError: Weights of an encoder are not those that the head was trained on.
    """
    checkpoint = parts.aligned.checkpoint
    parts.image.copy_to(folder / IMAGE)
    parts.text.copy_to(folder / TEXT)
    # From memory: training may have removed the files, which are read once.
    save_file(parts.aligned.model.state_dict(), folder / MODEL)
    copy_heads(folder)
    if parts.results is not None:
        shutil.copyfile(parts.results, folder / parts.results.name)
    config = checkpoint.metadata | {EXPORTED: _exported(parts)}
    write_json(folder / CONFIG, config)
    return _use(parts)


def copy_heads(folder: Path) -> None:
    """Put the file that builds the heads beside their weights."""
    shutil.copyfile(heads.__file__, folder / "heads.py")


def _exported(parts: Parts) -> dict[str, Any]:
    return {
        "encoders": {
            "image": {parts.image.name: _settings(parts.image, IMAGE)},
            "text": {parts.text.name: _settings(parts.text, TEXT)},
        },
        "max_pixels": parts.aligned.max_pixels,
    }


def _settings(part: EncoderPart[Any], folder: str) -> dict[str, Any]:
    is_fetched = part.on_hub and not part.with_weights
    place = (
        {"model": part.settings.model, "revision": part.fingerprint["revision"]}
        if is_fetched
        else {"model": folder, "revision": None}
    )
    settings: dict[str, Any] = part.settings.model_dump(mode="json") | place
    return {name: value for name, value in settings.items() if value is not None}


def _note(part: EncoderPart[Any], folder: str) -> str:
    """Say where its weights are, and what its licence asks for."""
    model = part.fingerprint["model"]
    if part.with_weights:
        where = f"The weights of {model} are in `{folder}`, with what they came with."
    elif part.on_hub:
        where = f"The weights of {model} are fetched from the hub, at the revision above."
    else:
        where = (
            f"The weights of {model} are not in `{folder}`, since its licence is not known to "
            f"allow it. Put the safetensors files there that have the sha256 above."
        )
    is_restricted = "nc" in (part.licence or "").lower().split("-")
    return where + (f" Their licence, {part.licence}, forbids commercial use." * is_restricted)


def _use(parts: Parts) -> str:
    template = TEMPLATES.get_template("huggingface.md.j2")
    notes = [_note(parts.image, IMAGE), _note(parts.text, TEXT)]
    if reason := _why_no_snippet(parts):
        return template.render(notes=notes, reason=reason)
    image, text = _image(parts), _text(parts)
    classes = {"AutoModel", image["image_class"], text["tokenizer_class"]}
    if not image["needs_numpy"]:
        classes.add("AutoImageProcessor")
    is_fast = parts.image.settings.mode == "fast"
    return template.render(
        **image, **text, classes=sorted(classes), notes=notes, is_fast=is_fast, reason=None
    )


def _why_no_snippet(parts: Parts) -> str | None:
    """Return why transformers alone cannot run an encoder; None if it can."""
    text, image = parts.text, parts.image
    reasons = {
        "transformers has no NV-Embed without code from the hub": text.model_settings.get(
            "model_type"
        )
        == "nvembed",
        "a ViT-MAE drops patches at random unless it is told not to": image.model_settings.get(
            "model_type"
        )
        == "vit_mae",
        f"the text encoder has more than a pooling ({', '.join(text.unusual)})": text.unusual,
        f"the text encoder pools by {text.settings.pooling}": text.settings.pooling
        not in TEXT_POOLINGS,
        "its image encoder is one tower of two, with its projection": image.settings.pooling
        == "projection",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _image(parts: Parts) -> dict[str, Any]:
    part, config = parts.image, parts.image.model_settings
    preprocessing = Preprocessing.from_config(read_image_processor(part.files.folder))
    pooling, layer = part.settings.pooling, part.settings.layer
    tower = IMAGE_TOWERS.get(config["model_type"])
    config = config.get("vision_config", config)
    tokens = "output.last_hidden_state" if layer == -1 else f"output.hidden_states[{layer}]"
    patches = "tokens"
    if (side := config.get("patch_size")) is None:
        tokens += ".flatten(2).transpose(1, 2)"
    else:
        height, width = preprocessing.output_size
        patches += f"[:, -{(height // side) * (width // side)}:]"
    return {
        "image_class": tower.plain.__name__ if tower else "AutoModel",
        "image_source": _source(part, IMAGE),
        "upright": part.settings.upright,
        "needs_numpy": preprocessing.in_float,  # whose own processor would need torchvision
        "rescale": preprocessing.rescale,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "size": preprocessing.output_size,
        "filter": "bilinear" if preprocessing.resample == BILINEAR else "bicubic",
        "image_options": "" if layer == -1 else ", output_hidden_states=True",
        "tokens": None if pooling == "pooler" else tokens,
        "image_pooling": {
            "pooler": "output.pooler_output.flatten(1)",
            "cls": "tokens[:, 0]",
            "mean": f"{patches}.mean(1)",
            "cls+mean": f"torch.cat([tokens[:, 0], {patches}.mean(1)], dim=-1)",
            "mean+max": f"torch.cat([{patches}.mean(1), {patches}.amax(1)], dim=-1)",
        }[pooling],
    }


def _text(parts: Parts) -> dict[str, Any]:
    part = parts.text
    end = part.fingerprint.get("end_token")
    has_file = (part.files.folder / "tokenizer.json").is_file()
    instruction = part.settings.instruction
    return {
        "tokenizer_class": "PreTrainedTokenizerFast" if has_file else "AutoTokenizer",
        "tokenizer": f'(tokenizer_file="{TEXT}/tokenizer.json")'
        if has_file
        else f'.from_pretrained("{TEXT}")',
        "text_source": _source(part, TEXT),
        "instruction": f"{instruction!r} + " if instruction else "",
        "kept": part.fingerprint["max_length"] - (end is not None),
        "end": end,
        "text_pooling": TEXT_POOLINGS[part.settings.pooling],
    }


def _source(part: EncoderPart[Any], folder: str) -> str:
    if part.on_hub and not part.with_weights:
        return f'"{part.settings.model}", revision="{part.fingerprint["revision"]}"'
    return f'"{folder}"'
