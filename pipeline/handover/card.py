"""The card of an exported head: what it is made of, what it scored, how it loads."""

import json
from typing import Any

from evaluate.results import Result, read_results
from pipeline.handover.layout import IMAGE, TEXT
from pipeline.handover.parts import EncoderPart, Parts
from pipeline.handover.snippet import TEMPLATES, snippet, why_no_snippet

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
