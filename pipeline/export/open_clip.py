"""`--to open_clip`: both heads, scale and bias under the names of open_clip.

No configuration of open_clip (4.2.0.dev0, 89fb801) describes such a model: its projections have no
LayerNorm. So the state dict is for a `CustomTextCLIP` whose projections are replaced by the heads;
the card has the lines.
"""

from pathlib import Path

from safetensors.torch import save_file

from pipeline.card import TEMPLATES
from pipeline.export.huggingface import copy_heads
from pipeline.export.parts import Parts

IMAGE_HEAD, TEXT_HEAD = "visual.head", "text.proj"
"""What open_clip calls the projection of a timm model, and that of one of transformers."""


def write(parts: Parts, folder: Path) -> str:
    """Write the state dict, without the encoders; return the lines that load it."""
    checkpoint, model = parts.aligned.checkpoint, parts.aligned.model
    heads = {IMAGE_HEAD: model.image_head, TEXT_HEAD: model.text_head}
    state = {
        f"{name}.{key}": weight.contiguous()
        for name, head in heads.items()
        for key, weight in head.state_dict().items()
    } | {"logit_scale": model.log_scale.detach(), "logit_bias": model.bias.detach()}
    save_file(state, folder / "open_clip_model.safetensors")
    copy_heads(folder)
    return TEMPLATES.get_template("open_clip.md.j2").render(
        settings=checkpoint.head.model_dump(exclude_none=True),
        image_dim=checkpoint.image["dim"],
        text_dim=checkpoint.text["dim"],
    )
