"""Writes docs/recipes.md, the reference of the run file, from the settings themselves."""

import json
import sys
from collections.abc import Iterator
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.config import AlignConfig, HeadConfig, LossConfig, OptimizerConfig
from evaluate.config import CheckConfig
from evaluate.measures import MEASURES, EvalConfig
from features.config import (
    ExtractConfig,
    ImageColumnConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
)
from features.encoders.backends import models
from features.sources import SOURCES
from pipeline.run.config import ReportConfig, RunSettings

INTRODUCTION = """\
# The run file

One TOML file describes a run. `sail extract`, `sail align` and `sail eval` take its path, or the
name of one that ships with the program: `demo`, `sail-small`, `sail`, `sail-paper` (in
`pipeline/recipes`). `--set section.key=value` overrides a setting. The resolved file, every default
written out, is kept as `config.toml` in the run folder.

Paths of sources and encoders are relative to the run file; `run.dir` is relative to where the
command is called.

This page is generated from the settings (`make format`); a test fails when it is stale.
"""
SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("[run]", RunSettings),
    *((f'[data.SPLIT] with kind = "{kind}"', source) for kind, source in SOURCES.items()),
    ("[encoders.image.NAME]", ImageEncoderConfig),
    ("[encoders.image.NAME.also.COLUMN]", ImageColumnConfig),
    ("[encoders.text.NAME]", TextEncoderConfig),
    ("[extract]", ExtractConfig),
    ("[align]", AlignConfig),
    ("[align.head]", HeadConfig),
    ("[align.loss]", LossConfig),
    ("[align.optimizer]", OptimizerConfig),
    ("[eval]", EvalConfig),
    *(section for measure in MEASURES for section in measure.sections.items()),
    ("[eval.check]", CheckConfig),
    ("[report]", ReportConfig),
]
MODELS: dict[tuple[type[BaseModel], str], str] = {
    (ImageEncoderConfig, "model"): "IMAGES",
    (TextEncoderConfig, "model"): "TEXTS",
}
"""Settings of which the table of encoders tells what they can be."""


def reference() -> str:
    """Return docs/recipes.md."""
    sections = [_section(title, model) for title, model in SECTIONS]
    return "\n".join([INTRODUCTION, *sections, _measures()])


def _measures() -> str:
    lines = ["## What is measured", ""]
    lines += ["| `eval.` | measure | what is asked | needs | primary metric |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for each in MEASURES:
        better = "" if each.greater_is_better else " (less is better)"
        cells = [f"`{each.name}`", each.title, each.in_short, each.needs]
        lines.append(f"| {' | '.join(cells)} | `{each.metric}`{better} |")
    return "\n".join([*lines, ""])


def _section(title: str, model: type[BaseModel]) -> str:
    lines = [f"## `{title}`", "", " ".join((model.__doc__ or "").split()), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *_rows(model), ""])


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if _is_section(annotation):
            continue
        meaning = " ".join((field.description or "").split())
        if (model, name) in MODELS:
            meaning = f"{meaning.removesuffix('.')}: {models(MODELS[model, name])}."
        yield f"| `{name}` | {_type(annotation, field)} | {_default(field)} | {meaning} |"


def _is_section(annotation: Any) -> bool:
    """Return whether a setting is a section of its own, or a table of such."""
    each = get_args(annotation)[1] if get_origin(annotation) is dict else annotation
    kinds = get_args(get_args(each)[0]) if get_origin(each) is Annotated else ()
    return all(isinstance(one, type) and issubclass(one, BaseModel) for one in kinds or (each,))


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """Return the type of a setting in words."""
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    words["RemotePath"] = "URL"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        text = " \\| ".join(f'`"{choice}"`' for choice in arguments)
    elif origin in (Union, UnionType):
        text = " \\| ".join(_type(member) for member in arguments if member is not type(None))
    elif origin is Annotated:
        text = _type(arguments[0])
    elif origin is tuple:
        text = f"list of {_type(arguments[0])}"
    elif origin is dict:
        text = f"table of {_type(arguments[1])}"
    else:
        name = getattr(annotation, "__name__", str(annotation))
        text = words.get(name, name.lower()) + (_bounds(field) if field else "")
    return text


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {getattr(rule, name):.10g}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "–"
    value = field.get_default()
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
