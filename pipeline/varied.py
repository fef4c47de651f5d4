"""What a sweep varies, as it is written on the command line."""

import click


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
    """Read `500`, `10k` or `2M`."""
    number, factor = text.strip().lower(), 1
    if number[-1:] in ("k", "m"):
        number, factor = number[:-1], {"k": 1000, "m": 1_000_000}[number[-1]]
    if not number.isdecimal() or int(number) == 0:
        raise click.BadParameter(
            f"{text!r} is not a number of pairs, as 500, 10k or 2M.", param_hint="--rows"
        )
    return int(number) * factor
