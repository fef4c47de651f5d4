"""Prompts for the names of classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.class_lists import CLASS_LISTS, read_class_list
from features.errors import EvaluationError
from features.storage.reading import Expected, checked, read_json


def read_templates(setting: Sequence[str] | str) -> tuple[str, ...]:
    """Return the prompts of a setting.

    Args:
        setting: The prompts themselves, the name of one of `CLASS_LISTS`, or the path of a JSON
            file `{"templates": […]}`.

    Raises:
        EvaluationError: The file cannot be read, or holds no list of prompts.
    """
    if not isinstance(setting, str):
        return tuple(setting)
    if setting in CLASS_LISTS:
        return read_class_list(setting).templates
    expected = Expected(
        f'One of {", ".join(CLASS_LISTS)}, or a JSON file {{"templates": ["a photo of a {{}}."]}}',
        "Correct eval.templates.",
        EvaluationError,
        called="The templates",
    )
    document: dict[str, Any] = read_json(Path(setting), dict[str, Any], expected)
    return tuple(checked(document.get("templates"), list[str], setting, expected))


def make_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Put every class name into every template: all prompts of the first class come first.

    Raises:
        EvaluationError: There is no template, or one has no place for the name.
    """
    if not templates:
        raise EvaluationError(
            "eval.templates is empty. At least one template was expected, such as 'a photo of a "
            "{}.'. Give one, or leave the setting out."
        )
    for template in templates:
        if "{}" not in template:
            raise EvaluationError(
                f"eval.templates has {template!r}, which has no place for the class name. One {{}} "
                f"was expected, as in 'a photo of a {{}}.'. Correct it."
            )
    return [template.replace("{}", name) for name in class_names for template in templates]
