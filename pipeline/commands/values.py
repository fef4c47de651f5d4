"""Settings and numbers as they are written on the command line."""

import re
from collections.abc import Sequence

import click

SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def settings_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read `KEY=VALUE,VALUE,…` of several keys."""
    settings: dict[str, list[str]] = {}
    for key, values in map(values_of, texts):
        if key in settings:
            raise click.BadParameter(
                f"{key!r} is named twice: give all its values together.", param_hint="--over"
            )
        settings[key] = values
    return settings


def values_of(text: str) -> tuple[str, list[str]]:
    """Read `KEY=VALUE,VALUE,…`."""
    key, separator, values = text.partition("=")
    if not separator or not all(value.strip() for value in values.split(",")):
        raise click.BadParameter(
            f"{text!r} is not KEY=VALUE,VALUE,…, as in align.head.kind=glu,linear.",
            param_hint="--over",
        )
    return key.strip(), [value.strip() for value in values.split(",")]


def seeds_of(text: str) -> list[int]:
    """Read `0,1,2`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r} are not whole numbers, as 0,1,2.", param_hint="--seeds")
    return [int(part) for part in parts]


def count_of(text: str) -> int:
    """Read a number of rows: `500`, `10k`, `1.5M`, `2G` or `2B`."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgb]?)", text.strip().lower())
    count = round(float(parts[1]) * SCALES[parts[2]]) if parts else 0
    if count == 0:
        raise click.BadParameter(
            f"{text!r} is no number of rows, such as 500, 10k or 23M.", param_hint="--rows"
        )
    return count
