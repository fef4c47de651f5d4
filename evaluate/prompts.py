"""Prompts for the names of classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.class_lists import CLASS_LISTS, read_class_list
from features.errors import EvaluationError
from features.storage.reading import Expected, checked, read_json

EXPECTED = Expected(
    f'One of {", ".join(CLASS_LISTS)}, a JSON file {{"templates": ["a photo of a {{}}."]}}, or one '
    f'with prompts for each class {{"tench": ["A tench is a fish."]}}',
    "Correct eval.templates.",
    EvaluationError,
    called="The templates",
)


def read_templates(setting: Sequence[str] | str) -> tuple[str, ...]:
    """Return the templates of a setting.

    Args:
        setting: The templates themselves, the name of one of `CLASS_LISTS`, or the path of a JSON
            file `{"templates": […]}`.

    Raises:
        EvaluationError: The file cannot be read, or holds no list of templates.
    """
    if not isinstance(setting, str):
        return tuple(setting)
    if setting in CLASS_LISTS:
        return read_class_list(setting).templates
    return tuple(checked(_document(setting).get("templates"), list[str], setting, EXPECTED))


def read_prompts(setting: Sequence[str] | str, class_names: Sequence[str]) -> list[list[str]]:
    """Return the prompts of each class: its name in every template, or those of a file for it.

    Args:
        setting: As for `read_templates`, or the path of a JSON file that has a list of prompts
            under the name of each class, in any case (`{"tench": ["A tench is a fish."]}`).
        class_names: Each must be in such a file; what else it has is not used.

    Raises:
        EvaluationError: There is no prompt for a class, or what `read_templates` raises.

    Reference:
        Pratt et al. 2023, CuPL, arXiv:2209.03320 (prompts of a language model for each class).
    """
    if not is_of_classes(setting):
        return make_prompts(class_names, read_templates(setting))
    there = {_folded(name): texts for name, texts in _document(str(setting)).items()}
    missing = [name for name in class_names if not there.get(_folded(name))]
    if missing:
        raise EvaluationError(
            f"{setting} has no prompts for {len(missing)} of {len(class_names)} classes, of which "
            f"{missing[0]!r} is the first; it has them for {list(there)[:5]}. A list of prompts "
            f"under the name of every class was expected. Correct the file, or `class_names` of "
            f"the source."
        )
    prompts = [there[_folded(name)] for name in class_names]
    return [list(checked(each, list[str], str(setting), EXPECTED)) for each in prompts]


def is_of_classes(setting: Sequence[str] | str) -> bool:
    """Return whether a setting is a file with prompts of their own for each class."""
    is_file = isinstance(setting, str) and setting not in CLASS_LISTS
    document = _document(setting) if is_file else {}  # type: ignore[arg-type]
    return bool(document) and "templates" not in document


def make_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Put every class name into every template.

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
    return [[template.replace("{}", name) for template in templates] for name in class_names]


def _document(setting: str) -> dict[str, Any]:
    document: dict[str, Any] = read_json(Path(setting), dict[str, Any], EXPECTED)
    return document


def _folded(name: str) -> str:
    return name.strip().casefold()
