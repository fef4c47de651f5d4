"""`sail export --to open_clip`: both heads, scale and bias under the names of open_clip.

No configuration of open_clip (4.2.0.dev0, 89fb801) describes such a model: its projections have no
LayerNorm. So the state dict is for a `CustomTextCLIP` whose projections are replaced by the heads;
the card has the lines.
"""

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from align.heads import MLP_EXPANSION, STAR_EXPANSION
from features.storage.files import replacing_folder
from pipeline.export.card import TEMPLATES, model_card
from pipeline.export.layout import CARD
from pipeline.export.parts import Parts

logger = logging.getLogger(__name__)
STATE = "open_clip_model.safetensors"
EXPANSIONS = {"star": STAR_EXPANSION, "mlp": MLP_EXPANSION}
IMAGE_HEAD, TEXT_HEAD = "visual.head", "text.proj"
"""What open_clip calls the projection of a timm model, and that of one of transformers."""


def export_open_clip(parts: Parts, out: Path) -> Path:
    """Write the state dict, without the encoders, and a card with the lines that load it."""
    checkpoint, model = parts.aligned.checkpoint, parts.aligned.model
    use = TEMPLATES.get_template("open_clip.md.j2").render(
        head=checkpoint.head,
        image_dim=checkpoint.image["dim"],
        text_dim=checkpoint.text["dim"],
        expansion=checkpoint.head.expansion or EXPANSIONS.get(checkpoint.head.kind),
    )
    with replacing_folder(out) as folder:
        save_file(_state(model), folder / STATE)
        (folder / CARD).write_text(model_card(parts, use=use), encoding="utf-8")
    logger.info("exported the heads of step %d to %s", checkpoint.step, out)
    return out


def _state(model: Any) -> dict[str, Tensor]:
    heads = {IMAGE_HEAD: model.image_head, TEXT_HEAD: model.text_head}
    return {
        f"{name}.{key}": weight.contiguous()
        for name, head in heads.items()
        for key, weight in head.state_dict().items()
    } | {"logit_scale": model.log_scale.detach(), "logit_bias": model.bias.detach()}
