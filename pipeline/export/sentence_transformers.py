"""`--to sentence-transformers`: the text encoder with its head, in its modules.

Nothing of that library is needed to write them: a folder for each module, with its settings and
weights, and `modules.json`, which names them in order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from align.checkpoint import CONFIG, MODEL
from features.errors import EncoderError
from features.storage.files import write_json
from pipeline.card import TEMPLATES
from pipeline.export.parts import Parts
from pipeline.python import TEXT

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
    """Write text encoder, pooling and head as the modules of a `SentenceTransformer`.

    Returns:
        How they are used.

    Raises:
        EncoderError: That library has no module for a part of it, or the licence of the encoder is
            not known to allow a copy.
    """
    _check_expressible(parts)
    parts.text.check_copyable("The folder")
    prompt = parts.text.settings.instruction
    parts.text.copy_to(folder / TEXT)
    transformer = {
        "max_seq_length": parts.text.settings.max_length,
        "do_lower_case": False,
        "model_args": {"dtype": "float32"},  # as it was encoded, whatever its file holds
    }
    write_json(folder / TEXT / "sentence_bert_config.json", transformer)
    named = [("Transformer", TEXT)]
    for number, module in enumerate(_modules(parts), start=1):
        named.append((module.kind, f"{number}_{module.kind}"))
        place = folder / named[-1][1]
        place.mkdir()
        write_json(place / CONFIG, module.settings)
        if module.weights:
            save_file(module.weights, place / MODEL)
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (kind, path) in enumerate(named)
    ]
    write_json(folder / "modules.json", modules)
    library = {
        "prompts": {"aligned": prompt} if prompt else {},
        "default_prompt_name": "aligned" if prompt else None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", library)
    return TEMPLATES.get_template("sentence_transformers.md.j2").render(dim=parts.aligned.dim)


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


def _modules(parts: Parts) -> Iterator[Module]:
    """Yield what comes behind the transformer, in order."""
    dim = parts.aligned.checkpoint.text["dim"]
    mode = POOLINGS[parts.text.settings.pooling]
    pooling = {
        "word_embedding_dimension": dim,
        "pooling_mode_cls_token": mode == "cls",
        "pooling_mode_mean_tokens": mode == "mean",
        "pooling_mode_lasttoken": mode == "lasttoken",
        "include_prompt": True,
    }
    yield Module("Pooling", pooling, {})
    head: Any = parts.aligned.model.text_head
    yield Module("LayerNorm", {"dimension": dim}, _weights(head.norm, "norm"))
    for name, activation in DENSE[parts.aligned.checkpoint.head.kind]:
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
