"""`sail export --to sentence-transformers`: the text encoder with its head, in its modules.

Nothing of that library is needed to write them: a folder for each module, with its settings and
weights, and `modules.json`, which names them in order.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from features.errors import EncoderError
from features.storage.files import replacing_folder
from pipeline.export.card import TEMPLATES, model_card
from pipeline.export.layout import CARD, CONFIG, MODEL, TEXT
from pipeline.export.parts import Parts

logger = logging.getLogger(__name__)
POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
KINDS = ("linear", "mlp")
IDENTITY, GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"


@dataclass(frozen=True)
class Module:
    """A module of sentence-transformers, as it lies in its folder."""

    kind: str
    settings: dict[str, Any]
    weights: dict[str, Tensor] = field(default_factory=dict)


def export_sentence_transformers(parts: Parts, out: Path) -> Path:
    """Write text encoder, pooling and head as the modules of a `SentenceTransformer`.

    Raises:
        EncoderError: That library has no module for a part of it, or the licence of the encoder is
            not known to allow a copy.
    """
    _check_expressible(parts)
    parts.text.check_copyable("The folder")
    prompt = parts.text.settings.instruction
    with replacing_folder(out) as folder:
        parts.text.copy_to(folder / TEXT)
        transformer = {
            "max_seq_length": parts.text.settings.max_length,
            "do_lower_case": False,
            "model_args": {"dtype": "float32"},  # as it was encoded, whatever its file holds
        }
        _write(folder / TEXT / "sentence_bert_config.json", transformer)
        named = [("Transformer", TEXT)]
        for number, module in enumerate(_modules(parts), start=1):
            named.append((module.kind, f"{number}_{module.kind}"))
            place = folder / named[-1][1]
            place.mkdir()
            _write(place / CONFIG, module.settings)
            if module.weights:
                save_file(module.weights, place / MODEL)
        _write(
            folder / "modules.json",
            [
                {
                    "idx": number,
                    "name": str(number),
                    "path": path,
                    "type": f"sentence_transformers.models.{kind}",
                }
                for number, (kind, path) in enumerate(named)
            ],
        )
        _write(
            folder / "config_sentence_transformers.json",
            {
                "prompts": {"aligned": prompt} if prompt else {},
                "default_prompt_name": "aligned" if prompt else None,
                "similarity_fn_name": "cosine",
            },
        )
        use = TEMPLATES.get_template("sentence_transformers.md.j2").render(dim=parts.aligned.dim)
        (folder / CARD).write_text(model_card(parts, use=use), encoding="utf-8")
    logger.info("exported %s with its head to %s", parts.text.name, out)
    return out


def _check_expressible(parts: Parts) -> None:
    head, pooling = parts.aligned.checkpoint.head, parts.text.settings.pooling
    model = parts.text.settings.model
    if head.kind not in KINDS:
        raise EncoderError(
            f"The head is of kind {head.kind}, for which sentence-transformers has no module. One "
            f"of {', '.join(KINDS)} was expected. Train one with `sail align RECIPE --set "
            f"align.head.kind=mlp`, or use --to hf or --to onnx."
        )
    if parts.text.model_settings.get("model_type") == "nvembed" or pooling not in POOLINGS:
        raise EncoderError(
            f"sentence-transformers has no module that pools as {model} does here ({pooling}). One "
            f"of {', '.join(POOLINGS)} was expected. Use --to hf."
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
    yield Module(
        "Pooling",
        {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": mode == "cls",
            "pooling_mode_mean_tokens": mode == "mean",
            "pooling_mode_lasttoken": mode == "lasttoken",
            "include_prompt": True,
        },
    )
    head: Any = parts.aligned.model.text_head
    norm = {f"norm.{name}": weight.detach() for name, weight in head.norm.named_parameters()}
    yield Module("LayerNorm", {"dimension": dim}, norm)
    if parts.aligned.checkpoint.head.kind == "linear":
        yield _dense(head.linear, IDENTITY)
    else:
        yield _dense(head.up, GELU)
        yield _dense(head.down, IDENTITY)
    yield Module("Normalize", {})


def _dense(linear: nn.Linear, activation: str) -> Module:
    settings = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": True,
        "activation_function": activation,
    }
    weights = {f"linear.{name}": weight.detach() for name, weight in linear.named_parameters()}
    return Module("Dense", settings, weights)


def _write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
