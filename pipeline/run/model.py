"""The trained head of a run as a folder with a card: `run.dir/model`."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from align.checkpoint import CONFIG, MODEL, Checkpoint
from features.storage.files import replacing_folder

logger = logging.getLogger(__name__)
CARD = "README.md"


def export_model(checkpoint_path: Path, target: Path) -> Path:
    """Copy a checkpoint, with a card that says what it is: all of the folder, or nothing.

    The copy has no optimizer's state, and `align.checkpoint.load_head` opens it. When it is
    there already, nothing is done.

    Args:
        checkpoint_path: Folder of a checkpoint, such as `align/best`.
        target: The folder to write; an older one is replaced.

    Raises:
        CheckpointError: There is no whole checkpoint.
    """
    checkpoint = Checkpoint.open(checkpoint_path)
    card = model_card(checkpoint)
    if (target / CARD).is_file() and (target / CARD).read_text(encoding="utf-8") == card:
        return target
    with replacing_folder(target) as folder:
        for name in (MODEL, CONFIG):
            shutil.copyfile(checkpoint.path / name, folder / name)
        (folder / CARD).write_text(card, encoding="utf-8")
    logger.info("exported the head of step %d to %s", checkpoint.step, target)
    return target


def model_card(checkpoint: Checkpoint) -> str:
    """Return the card of a head: what it joins, whose licences, how it was chosen, how it loads."""
    head, run = checkpoint.head, checkpoint.run
    scores = ", ".join(f"{name} {value:.3f}" for name, value in checkpoint.heldout.items())
    sizes = json.dumps(head.model_dump(exclude_none=True))
    return f"""# An alignment head

Two small networks that map features of a frozen image encoder and of a frozen text encoder into one
space of {head.dim} numbers, where the cosine says how well an image and a text fit.

| | image | text |
| --- | --- | --- |
{_row("encoder", [_model(checkpoint.image), _model(checkpoint.text)])}
{_row("revision", [_told(each, "revision") for each in (checkpoint.image, checkpoint.text)])}
{_row("pooling", [_told(each, "pooling") for each in (checkpoint.image, checkpoint.text)])}
{_row("feature length", [checkpoint.image["dim"], checkpoint.text["dim"]])}
{_row("licence", [_told(each, "licence") for each in (checkpoint.image, checkpoint.text)])}

* Head: `{sizes}`
* Trained on a store of {run["store"]["rows"]:,} rows, caption fields {", ".join(run["fields"])},
  seed {run["seed"]}, to step {checkpoint.step}, epoch {checkpoint.metadata["epoch"]:.3g}
* On held-out rows: {scores or "not scored"}
* sha256 of the weights: `{checkpoint.sha256}`

The weights of the head are bound to these encoders, and to what their licences allow.

```python
from align.checkpoint import load_head

model, about = load_head("model")
image = model.embed_image(image_features)  # float tensors (rows, feature length)
text = model.embed_text(text_features)     # not normalised; compare by cosine
```
"""


def _row(name: str, cells: list[object]) -> str:
    return f"| {name} | {' | '.join(str(cell) for cell in cells)} |"


def _model(encoder: dict[str, Any]) -> str:
    return f"{encoder['name']}: {_told(encoder, 'model')}"


def _told(encoder: dict[str, Any], field: str) -> object:
    value = encoder["fingerprint"].get(field)
    return "not stated" if value is None else value
