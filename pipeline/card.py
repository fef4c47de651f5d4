"""The card of a head (README.md): what it joins, what it scored, how it is used."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align.checkpoint import CONFIG, MODEL, Checkpoint, facts_of
from evaluate.results import Result, read_results
from features.storage.files import replacing_folder

logger = logging.getLogger(__name__)
CARD = "README.md"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
    autoescape=False,  # the page is Markdown and Python
)
FIELDS = [
    ("revision", "revision"),
    ("licence", "licence"),
    ("trained", "supervision"),
    ("sha256 of its weights", "weights_sha256"),
]
LONGEST = 40
"""Characters of a list in the protocol that stands in the table; results.json has all."""
USE_OF_HEAD = """\
The features of these encoders go in; `sail export` writes a folder that embeds images and texts.

```python
from align.checkpoint import load_head

model, about = load_head("model")
image = model.embed_image(image_features)  # float tensors (rows, feature length)
text = model.embed_text(text_features)     # not normalised; compare by cosine
```
"""


def export_model(checkpoint_path: Path, target: Path) -> Path:
    """Copy a checkpoint with its card: all of the folder, or nothing.

    The copy has no optimizer's state, and `align.checkpoint.load_head` opens it. When it is
    there already, nothing is done.

    Args:
        checkpoint_path: Folder of a checkpoint, such as `align/best`.
        target: The folder to write; an older one is replaced.

    Raises:
        CheckpointError: There is no whole checkpoint.
    """
    checkpoint = Checkpoint.open(checkpoint_path)
    card = model_card(checkpoint, USE_OF_HEAD)
    if (target / CARD).is_file() and (target / CARD).read_bytes() == card.encode():
        return target
    with replacing_folder(target) as folder:
        for name in (MODEL, CONFIG):
            shutil.copyfile(checkpoint.path / name, folder / name)
        (folder / CARD).write_text(card, encoding="utf-8")
    logger.info("exported the head of step %d to %s", checkpoint.step, target)
    return target


def model_card(
    checkpoint: Checkpoint,
    use: str,
    *,
    name: str = "aligned",
    base_models: Sequence[str] = (),
    results: Path | None = None,
) -> str:
    """Return the README.md of a folder with a head.

    Args:
        checkpoint: The head.
        use: How the folder is used, in Markdown.
        name: Of the run.
        base_models: Encoders that are on the hub, by their ids.
        results: A results.json whose numbers are of this head.
    """
    return TEMPLATES.get_template("card.md.j2").render(
        name=name,
        checkpoint=checkpoint,
        base_models=base_models,
        encoders=_encoders(checkpoint),
        use=use,
        sizes=json.dumps(checkpoint.head.model_dump(exclude_none=True)),
        rows=checkpoint.run["store"]["rows"],
        fields=checkpoint.run["fields"],
        heldout=", ".join(f"{name} {value:.3f}" for name, value in checkpoint.heldout.items()),
        results=read_results(results) if results else [],
        interval=_interval,
        protocol=_protocol,
    )


def _encoders(checkpoint: Checkpoint) -> list[tuple[str, object, object]]:
    """Return the rows of the table: name, and what it is of either encoder."""
    encoders = checkpoint.image, checkpoint.text
    image, text = map(facts_of, encoders)
    rows = [(name, _told(image.get(field)), _told(text.get(field))) for name, field in FIELDS]
    layer = "" if image.get("layer", -1) == -1 else f" of layer {image['layer']}"
    return [
        ("encoder", *(f"{each['name']}: {facts_of(each)['model']}" for each in encoders)),
        *rows,
        ("pooling", f"{_told(image.get('pooling'))}{layer}", _told(text.get("pooling"))),
        ("feature length", *(each["dim"] for each in encoders)),
    ]


def _told(value: object) -> object:
    return "not stated" if value is None else value


def _interval(result: Result) -> str:
    return "" if result.ci95 is None else "{:.3f}–{:.3f}".format(*result.ci95)


def _protocol(result: Result) -> str:
    """Return what could change a number, in one cell of a table."""
    cells = [f"{name} {_short(value)}" for name, value in result.protocol.items()]
    return "; ".join(cell for cell in cells if not cell.startswith("rows_sha256"))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | dict) and len(str(value)) > LONGEST:
        return f"({len(value)} of them)"
    return str(value)
