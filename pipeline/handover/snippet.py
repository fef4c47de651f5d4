"""The lines of a card that load an exported head with torch and transformers alone."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from features.encoders.image import IMAGE_TOWERS, read_image_processor
from features.images import Preprocessing
from features.processors import BILINEAR
from pipeline.handover.layout import IMAGE, TEXT
from pipeline.handover.parts import EncoderPart, Parts

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
    autoescape=False,  # the page is Markdown and Python
)
TEXT_POOLINGS = {
    "mean": "last_hidden_state.mean(1)",
    "cls": "last_hidden_state[:, 0]",
    "last": "last_hidden_state[:, -1]",
    "pooler": "pooler_output",
}


def why_no_snippet(parts: Parts) -> str | None:
    """Return why transformers alone cannot run an encoder; None if it can."""
    if parts.text.model_settings.get("model_type") == "nvembed":
        return "transformers has no NV-Embed without code from the hub"
    if parts.image.model_settings.get("model_type") == "vit_mae":
        return "a ViT-MAE drops patches at random unless it is told not to"
    return None


def snippet(parts: Parts) -> str:
    """Return Python code that embeds images and texts as the run itself does on a CPU."""
    image = _image(parts)
    text = _text(parts)
    classes = {"AutoModel", image["image_class"], text["tokenizer_class"]}
    if not image["needs_numpy"]:
        classes.add("AutoImageProcessor")
    template = TEMPLATES.get_template("load.py.j2")
    head = parts.aligned.checkpoint.head
    return template.render(**image, **text, head=head, classes=sorted(classes))


def _image(parts: Parts) -> dict[str, Any]:
    part, config = parts.image, parts.image.model_settings
    preprocessing = Preprocessing.from_config(read_image_processor(part.files.folder))
    pooling, layer = part.settings.pooling, part.settings.layer
    tower = IMAGE_TOWERS.get(config["model_type"])
    config = config["vision_config"] if tower else config
    tokens = "output.last_hidden_state" if layer == -1 else f"output.hidden_states[{layer}]"
    patches = "tokens"
    if (side := config.get("patch_size")) is None:
        tokens += ".flatten(2).transpose(1, 2)"
    else:
        height, width = preprocessing.output_size
        patches += f"[:, -{(height // side) * (width // side)}:]"
    return {
        "image_class": tower.__name__ if tower else "AutoModel",
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
        "kept": part.settings.max_length - (end is not None),
        "end": end,
        "text_pooling": TEXT_POOLINGS[part.settings.pooling],
    }


def _source(part: EncoderPart[Any], folder: str) -> str:
    """Return what `from_pretrained` is given."""
    if part.on_hub and not part.with_weights:
        return f'"{part.settings.model}", revision="{part.fingerprint["revision"]}"'
    return f'"{folder}"'
