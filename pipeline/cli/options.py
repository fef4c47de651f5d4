"""What commands of `sail` share: options, and the clean end by a signal."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

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


def complete_recipe(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Offer the recipes that ship, where one begins so; else the shell's own files."""
    from pipeline.run.config import shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(begun)] if begun else []
    return [CompletionItem(name) for name in names] or [CompletionItem(begun, type="file")]


def complete_folder(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Offer folders: a store is one, or a URL."""
    return [CompletionItem(begun, type="dir")]


store_argument = click.argument("store", shell_complete=complete_folder)
override = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a setting of the recipe; may be repeated.",
)


def stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the argument and the options that all stages share."""
    options = [
        click.argument("recipe", shell_complete=complete_recipe),
        override,
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--verbose", is_flag=True, help="Log more."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def trainings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of those that train many heads."""
    function = click.option(
        "--eval", "evaluates", is_flag=True, help="Measure each head by `sail eval` too."
    )(function)
    return click.option(
        "--seeds", default="0,1,2", show_default=True, help="Each is trained with all of these."
    )(function)


SAVED = "what is done is saved. The same command goes on from here."


def until_stopped(work: Callable[[Any], Any], *, kept: str = SAVED) -> Any:
    """Return what work returns; where a signal ends it cleanly, exit with the signal's code."""
    from pipeline.interrupt import Stopped, stop_on_signal

    with stop_on_signal() as stop:
        try:
            return work(stop)
        except Stopped:
            click.echo(f"Stopped; {kept}", err=True)
            sys.exit(stop.exit_code)


def run_stage(
    recipe: str,
    overrides: tuple[str, ...],
    work: Callable[[Any, Any], Any],
    *,
    as_json: bool | None,
    verbose: bool,
    kept: str = SAVED,
) -> Any:
    """Load the recipe, do the work so that a signal ends it cleanly, and print what it returns.

    Nothing is printed where it returns None.
    """
    from pipeline.progress import start_log
    from pipeline.run.config import load_config
    from pipeline.run.cpu import keep_freed_memory

    start_log(verbose=verbose)
    keep_freed_memory()
    config = load_config(recipe, overrides)
    result = until_stopped(lambda stop: work(config, stop), kept=kept)
    if as_json is not None and result is not None:
        click.echo(json.dumps(result) if as_json else "\n".join(result))
    return result
