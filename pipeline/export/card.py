"""The card of an exported head: what it is made of, what it scored, how it loads."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluate.results import Result, read_results
from features.encoders.image import IMAGE_TOWERS, read_image_processor
from features.images import BILINEAR, Preprocessing
from pipeline.export.layout import IMAGE, TEXT
from pipeline.export.parts import EncoderPart, Parts

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


FIELDS = [
    ("encoder", "model"),
    ("revision", "revision"),
    ("licence", "licence"),
    ("trained", "supervision"),
    ("sha256 of its weights", "weights_sha256"),
]
LONGEST = 40
"""Characters of a list in the protocol that stands in the table; results.json has all."""


def model_card(parts: Parts, use: str | None = None) -> str:
    """Return the README.md of an exported folder.

    Args:
        parts: What is exported.
        use: How the folder is used and what is in it, if it is not that of `--to hf`.
    """
    checkpoint = parts.aligned.checkpoint
    reason = why_no_snippet(parts)
    run = parts.aligned.run_config
    both: list[tuple[EncoderPart[Any], str]] = [(parts.image, IMAGE), (parts.text, TEXT)]
    template = TEMPLATES.get_template("card.md.j2")
    return template.render(
        name=run.run.name if run else "aligned",
        checkpoint=checkpoint,
        base_models=[part.settings.model for part, _ in both if part.on_hub],
        encoders=_encoders(parts),
        notes=[_note(part, folder) for part, folder in both] if use is None else [],
        use=use,
        sizes=json.dumps(checkpoint.head.model_dump(exclude_none=True)),
        rows=checkpoint.run["store"]["rows"],
        fields=checkpoint.run["fields"],
        heldout=", ".join(f"{name} {value:.3f}" for name, value in checkpoint.heldout.items()),
        results=read_results(parts.results) if parts.results else [],
        interval=_interval,
        protocol=_protocol,
        code=None if reason else snippet(parts),
        reason=reason,
        is_fast=parts.image.settings.mode == "fast",
    )


def _encoders(parts: Parts) -> list[tuple[str, object, object]]:
    """Return the rows of the table: name, and what it is of either encoder."""
    image, text = parts.image, parts.text
    trained = parts.aligned.checkpoint
    layer = "" if image.settings.layer == -1 else f" of layer {image.settings.layer}"
    rows = [
        (name, _told(image.fingerprint.get(field)), _told(text.fingerprint.get(field)))
        for name, field in FIELDS
    ]
    return [
        *rows,
        ("pooling", f"{image.settings.pooling}{layer}", text.settings.pooling),
        ("feature length", trained.image["dim"], trained.text["dim"]),
    ]


def _told(value: object) -> object:
    return "not stated" if value is None else value


def _note(part: EncoderPart[Any], folder: str) -> str:
    """Return where the weights of an encoder are, and what its licence asks for."""
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


def _interval(result: Result) -> str:
    return "" if result.ci95 is None else "{:.3f}–{:.3f}".format(*result.ci95)


def _protocol(result: Result) -> str:
    """Return what could change a number, in one cell of a table."""
    cells = [f"{name} {_short(value)}" for name, value in result.protocol.items()]
    return "; ".join(cell for cell in cells if not cell.startswith("rows_sha256"))


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | dict) and len(str(value)) > LONGEST:
        return f"({len(value)} of them)"
    return str(value)
