"""`--to sentence-transformers`: both encoders with their heads, in its modules.

Nothing of that library is needed to write them: a folder for each module, with its settings and
weights, and `modules.json`, which names them in order.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from align.checkpoint import CONFIG, MODEL
from features.encoders.towers import IMAGE_TOWERS
from features.errors import EncoderError
from features.storage.files import write_json
from pipeline.card import TEMPLATES
from pipeline.export.parts import EncoderPart, Parts
from pipeline.python import IMAGE, TEXT

logger = logging.getLogger(__name__)
LIBRARY = "sentence_transformers.models"
FLOAT32 = {"dtype": "float32"}
"""As it was encoded, whatever the file of an encoder holds."""
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
TASK = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
IDENTITY, GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"
DENSE = {"linear": [("linear", IDENTITY)], "mlp": [("up", GELU), ("down", IDENTITY)]}
"""Layers and activations behind the LayerNorm, of each kind of head that has no others."""


class Module(NamedTuple):
    """A module of sentence-transformers, as it lies in its folder."""

    kind: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]


def write(parts: Parts, folder: Path) -> str:
    """Write encoders, poolings and heads as the modules of a `SentenceTransformer`.

    Where that library can express the image side too, it is a model of two towers: a `Router` by
    what is encoded. Otherwise it is the text side alone, and the log says why.

    Returns:
        How they are used.

    Raises:
        EncoderError: That library has no module for a part of the text side, or the licence of an
            encoder is not known to allow a copy.
    """
    _check_expressible(parts)
    parts.text.check_copyable("The folder")
    prompt = parts.text.settings.instruction
    transformer = {
        "max_seq_length": parts.text.settings.max_length,
        "do_lower_case": False,
        "model_args": FLOAT32,
    }
    why_not = _not_expressible(parts)
    if why_not:
        logger.warning("sentence-transformers gets the text side alone: %s", why_not)
        text = _write_side(folder, TEXT, parts.text, transformer, _text_modules(parts))
        modules = _listed(text)
    else:
        parts.image.check_copyable("The folder")
        image = {"modality_config": {"image": FORWARD}, "model_args": FLOAT32} | TASK
        sides = {
            "image": _write_side(folder, IMAGE, parts.image, image, _image_modules(parts)),
            "text": _write_side(
                folder,
                TEXT,
                parts.text,
                transformer | {"modality_config": {"text": FORWARD}} | TASK,
                _text_modules(parts),
            ),
        }
        router = {
            "types": {
                place: f"{LIBRARY}.{kind}" for side in sides.values() for kind, place in side
            },
            "structure": {name: [place for _, place in side] for name, side in sides.items()},
            "parameters": {"default_route": "text", "allow_empty_key": True},
        }
        write_json(folder / "router_config.json", router)
        modules = _listed([("Router", "")])
    write_json(folder / "modules.json", modules)
    library = {
        "prompts": {"aligned": prompt} if prompt else {},
        "default_prompt_name": "aligned" if prompt else None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", library)
    template = TEMPLATES.get_template("sentence_transformers.md.j2")
    return template.render(dim=parts.aligned.dim, has_images=not why_not)


def _write_side(
    folder: Path,
    name: str,
    part: EncoderPart[Any],
    transformer: dict[str, Any],
    modules: Iterator[Module],
) -> list[tuple[str, str]]:
    """Write an encoder and what comes behind it; return the kind and the folder of each."""
    part.copy_to(folder / name)
    write_json(folder / name / "sentence_bert_config.json", transformer)
    named = [("Transformer", name)]
    for number, module in enumerate(modules, start=1):
        named.append((module.kind, f"{name.removesuffix('_encoder')}_{number}_{module.kind}"))
        place = folder / named[-1][1]
        place.mkdir()
        write_json(place / CONFIG, module.settings)
        if module.weights:
            save_file(module.weights, place / MODEL)
    return named


def _listed(named: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"{LIBRARY}.{kind}"}
        for number, (kind, path) in enumerate(named)
    ]


def _not_expressible(parts: Parts) -> str:
    """Say what of the image side that library has no module for; nothing where it has all."""
    image, model_type = parts.image.settings, parts.image.model_settings.get("model_type")
    if image.pooling != "cls" or image.layer != -1:
        return f"it has no pooling of images as {image.pooling!r} of layer {image.layer}"
    if model_type in IMAGE_TOWERS or model_type == "vit_mae" or image.upright:
        return f"it loads or prepares pictures of {image.model} otherwise"
    return ""


def _check_expressible(parts: Parts) -> None:
    head, pooling = parts.aligned.checkpoint.head, parts.text.settings.pooling
    model = parts.text.settings.model
    if head.kind not in DENSE:
        raise EncoderError(
            f"The head is of kind {head.kind}, for which sentence-transformers has no module. One "
            f"of {', '.join(DENSE)} was expected. Train one with `sail align RECIPE --set "
            f"align.head.kind=linear`, or use --to hf or --to onnx."
        )
    if head.shortcut:
        raise EncoderError(
            f"The head is of kind {head.kind} with a linear map beside it, for which "
            f"sentence-transformers has no module. A linear head was expected, or an mlp that was "
            f"trained with `--set align.start=random`. Use --to hf or --to onnx for this one."
        )
    if parts.text.model_settings.get("model_type") == "nvembed" or pooling not in POOLINGS:
        raise EncoderError(
            f"sentence-transformers has no module that pools as {model} does here ({pooling}). One "
            f"of {', '.join(POOLINGS)} was expected. Use --to hf."
        )
    if (unusual := parts.text.unusual) or parts.text.files.trunk != parts.text.files.folder:
        raise EncoderError(
            f"{model} has more than a pooling ({', '.join(unusual) or 'a folder of its own'}), "
            f"which is not written as modules of sentence-transformers here. A plain text encoder "
            f"was expected. Use --to hf."
        )
    if parts.text.fingerprint.get("end_token") is not None:
        raise EncoderError(
            f"The tokenizer of {model} does not add the end token that is pooled, and "
            f"sentence-transformers takes the tokenizer as it is. One that adds it was expected. "
            f"Use --to hf."
        )


def _text_modules(parts: Parts) -> Iterator[Module]:
    mode, model = POOLINGS[parts.text.settings.pooling], parts.aligned.model
    yield _pooling(parts.aligned.checkpoint.text["dim"], mode)
    yield from _head(model.text_head, parts.aligned.checkpoint.head.kind)


def _image_modules(parts: Parts) -> Iterator[Module]:
    yield _pooling(parts.aligned.checkpoint.image["dim"], "cls")
    yield from _head(parts.aligned.model.image_head, parts.aligned.checkpoint.head.kind)


def _pooling(dim: int, mode: str) -> Module:
    settings = {
        "word_embedding_dimension": dim,
        "pooling_mode_cls_token": mode == "cls",
        "pooling_mode_mean_tokens": mode == "mean",
        "pooling_mode_lasttoken": mode == "lasttoken",
        "include_prompt": True,
    }
    return Module("Pooling", settings, {})


def _head(head: Any, kind: str) -> Iterator[Module]:
    """Yield the modules of a head, and what makes its vectors of length 1."""
    norm = _weights(head.norm, "norm")
    yield Module("LayerNorm", {"dimension": len(norm["norm.weight"])}, norm)
    for name, activation in DENSE[kind]:
        linear = head.get_submodule(name)
        settings = {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": True,
            "activation_function": activation,
        }
        yield Module("Dense", settings, _weights(linear, "linear"))
    yield Module("Normalize", {}, {})


def _weights(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": weight.detach() for name, weight in layer.named_parameters()}
