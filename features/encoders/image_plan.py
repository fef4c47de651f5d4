"""Decides how an image encoder of transformers is used: its files first, then its type."""

from typing import Any

import torch
from transformers import AutoModel

from features.config import ImageColumnConfig, ImageEncoderConfig
from features.encoders.checkpoint import EncoderFiles, read_config, read_settings
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.pooling import LAST_LAYER
from features.encoders.processors import make_preprocessing, processor_file, read_image_processor
from features.encoders.remote_code import check_remote_code
from features.encoders.structure import structure_of
from features.encoders.towers import IMAGE_TOWERS, own_pooling, tower_config
from features.errors import EncoderError
from features.images import Preprocessing

CHOICES = "`cls`, `mean`, `cls+mean`, `mean+max` or `pooler`"
# Types with a class token whose own pooler is what they were made to give.
POOLER_TYPES = frozenset({"beit", "data2vec-vision", "pixio", "blip_vision_model"})


def resolve_image(config: ImageEncoderConfig, files: EncoderFiles) -> EncoderPlan:
    """Decide how an image encoder is used.

    Raises:
        EncoderError: Its files cannot be read, ask for what is not there, or do not say how an
            image becomes a vector.
    """
    whole = read_config(files.folder)
    check_remote_code(read_settings(files.folder), files.folder, told=False)
    own = image_config(config.model, whole)
    processor = read_image_processor(files.folder)
    preprocessing = make_preprocessing(files.folder, processor)
    made = PlanBuilder()
    made.decisions["trunk"] = Decision(own.model_type, "config.json")
    decide_poolings(made, config, whole)
    structure = structure_of(own)
    if structure is not None:
        made.decisions["class_tokens"] = Decision(structure.classes, f"its type, {own.model_type}")
        others = (structure.prefix or 0) - structure.classes
        made.decisions["other_tokens"] = Decision(others, f"its type, {own.model_type}")
    path = processor_file(files.folder)
    made.decisions["processor"] = Decision(preprocessing.processor, path.name)
    height, width = preprocessing.output_size
    made.decisions["size"] = Decision(f"{height} × {width}", path.name)
    applied_by = "this program" if isinstance(preprocessing, Preprocessing) else "transformers"
    made.decisions["applied_by"] = Decision(applied_by, "equal to transformers' Pillow class")
    return EncoderPlan(
        kind="image",
        model=config.model,
        decisions=made.decisions,
        files={"config.json": files.folder / "config.json", path.name: path},
    )


def image_config(model: str, config: Any) -> Any:
    """Return the configuration of what sees images.

    Raises:
        EncoderError: It is a model of several inputs whose image tower is not known here.
    """
    if config.model_type in IMAGE_TOWERS:
        return tower_config(config, "vision")
    if hasattr(config, "vision_config"):
        raise EncoderError(
            f"{model} is a model of several inputs ({config.model_type}), of which no image tower "
            f"is known here. An image encoder, or one of {', '.join(sorted(IMAGE_TOWERS))}, was "
            f"expected. Choose another, or bring its vectors with `sail import-store`."
        )
    return config


def decide_poolings(made: PlanBuilder, config: ImageEncoderConfig, whole: Any) -> None:
    """Decide the pooling of an encoder's own column, and of those of its `also`."""
    columns: dict[str, ImageColumnConfig] = {"pooling": config}
    columns |= {f"pooling of {name}": each for name, each in config.also.items()}
    for name, column in columns.items():
        if column.pooling == "auto":
            made.decisions[name] = _default(config.model, whole, column.layer)
        else:
            made.decide(name, column.pooling, Decision("auto", ""))
        if column.layer != LAST_LAYER:
            made.decisions[name.replace("pooling", "layer")] = Decision(column.layer, "the recipe")


def _default(model: str, whole: Any, layer: int) -> Decision:
    kind = whole.model_type
    source = f"its type, {kind}"
    own = image_config(model, whole)
    structure = structure_of(own)
    has_class = structure is not None and structure.classes > 0
    if layer != LAST_LAYER:
        return Decision("cls" if has_class else "mean", source)
    if kind in IMAGE_TOWERS:
        return Decision(own_pooling(IMAGE_TOWERS[kind], whole), source)
    if has_class and kind not in POOLER_TYPES:
        return Decision("cls", source)
    return Decision(_given_pooling(model, own), f"{source}: what it gives")


def _given_pooling(model: str, config: Any) -> str:
    """Return `pooler` where a model without a class token has one, else `mean`.

    It is built without weights, and run without numbers.

    Raises:
        EncoderError: That cannot be told, or its tokens are not known.
    """
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    try:
        with torch.device("meta"), torch.inference_mode():
            built = AutoModel.from_config(config).eval()
            output = built(torch.empty(1, 3, height, width))
        if getattr(output, "pooler_output", None) is not None:
            return "pooler"
        if (known := structure_of(config)) is not None and known.classes == 1:
            return "cls"
        if output.last_hidden_state.ndim == 4 or known is not None:
            return "mean"
    except Exception:  # noqa: BLE001 - whatever the code of a type raises: not to be told
        pass
    raise EncoderError(
        f"No file of {model} says how an image becomes one vector, and its type, "
        f"{config.model_type}, is not known here. A pooling was expected. Set `pooling` of the "
        f"image encoder to {CHOICES}."
    )
