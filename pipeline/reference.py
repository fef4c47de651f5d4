"""Writes docs/recipes.md, the reference of the run file, from the settings themselves."""

import json
import sys
from collections.abc import Iterator
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evaluate.measures import MEASURES
from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.backends import models
from pipeline.run.config import RunConfig, kinds_of

INTRODUCTION = """\
# The run file

One TOML file describes a run. `sail extract`, `sail align` and `sail eval` take its path, or the
name of one that ships with the program: `demo`, `sail-small`, `sail`, `sail-paper` (in
`pipeline/recipes`). `--set section.key=value` overrides a setting. The resolved file, every default
written out, is kept as `config.toml` in the run folder, and what each stage ran with as
`config.toml` in `features/`, `align/` and `eval/` there.

Paths of sources and encoders are relative to the run file; `run.dir` is relative to where the
command is called.

This page is generated from the settings (`make format`); a test fails when it is stale.
"""
COLUMNS = ("name", "type", "default", "meaning")
NAMES = {"data": "SPLIT", "also": "COLUMN"}
"""What the names in a table of sections are names of; else they are called NAME."""
MODELS: dict[tuple[type[BaseModel], str], str] = {
    (ImageEncoderConfig, "model"): "IMAGES",
    (TextEncoderConfig, "model"): "TEXTS",
}
"""Settings of which the table of encoders tells what they can be."""


def reference() -> str:
    """Return docs/recipes.md."""
    found = [_section(title, model) for title, model in sections()]
    return "\n".join([INTRODUCTION, *found, _measures()])


def settings_with(word: str) -> dict[str, list[dict[str, str]]]:
    """Return the settings of the sections in whose title a word stands, or that have it as a name.

    Args:
        word: Such as `webdataset`, `align.loss` or `batch_size`; empty for all.

    Returns:
        By the title of the section: `name`, `type`, `default` and `meaning` of each.
    """
    found = {}
    for title, model in sections():
        rows = [dict(zip(COLUMNS, each, strict=True)) for each in _cells(model)]
        if word not in title:
            rows = [row for row in rows if row["name"] == word]
        if rows:
            found[title] = rows
    return found


def sections(
    model: type[BaseModel] = RunConfig, place: str = "", kind: str = ""
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the title and the settings of every section of a run file, in order."""
    fields = {name: field.annotation for name, field in model.model_fields.items()}
    inner = {name: found for name, each in fields.items() if (found := _sections_in(each))}
    if inner.keys() != fields.keys():
        yield f'[{place}] with kind = "{kind}"' if kind else f"[{place}]", model
    for name, kinds in inner.items():
        path = [*filter(None, [place]), name]
        path += [NAMES.get(name, "NAME")] * (get_origin(fields[name]) is dict)
        for kind_of_section, section in kinds.items():
            yield from sections(section, ".".join(path), kind_of_section)


def _sections_in(annotation: Any) -> dict[str, type[BaseModel]]:
    """Return the sections that a setting is, or is a table of: by kind, or one without a kind."""
    each = get_args(annotation)[1] if get_origin(annotation) is dict else annotation
    is_section = isinstance(each, type) and issubclass(each, BaseModel)
    return {"": each} if is_section else kinds_of(each)


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
    for name, *others in _cells(model):
        yield f"| `{name}` | {' | '.join(others)} |"


def _cells(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if _sections_in(annotation):
            continue
        meaning = " ".join((field.description or "").split())
        if (model, name) in MODELS:
            meaning = f"{meaning.removesuffix('.')}: {models(MODELS[model, name])}."
        yield name, _type(annotation, field), _default(field), meaning


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
