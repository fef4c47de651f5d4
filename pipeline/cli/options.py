"""What commands of `sail` share: options, and the clean end by a signal."""

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
run_argument = click.argument("run", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
override = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a setting of the recipe; may be repeated.",
)
SAVED = "what is done is saved. The same command goes on from here."


def settings_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read `KEY=VALUE,VALUE,…` of several keys."""
    settings: dict[str, list[str]] = {}
    for text in texts:
        key, _, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not all(values):
            raise click.BadParameter(
                f"{text!r} is not KEY=VALUE,VALUE,…, as in align.head.kind=glu,linear.",
                param_hint="--over",
            )
        if key.strip() in settings:
            raise click.BadParameter(
                f"{key.strip()!r} is named twice: give all its values together.",
                param_hint="--over",
            )
        settings[key.strip()] = values
    return settings


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


def until_stopped(work: Callable[[Any], Any], *, kept: str = SAVED) -> Any:
    """Return what work returns; where a signal ends it cleanly, exit with the signal's code."""
    from pipeline.interrupt import Stopped, stop_on_signal

    with stop_on_signal() as stop:
        try:
            return work(stop)
        except Stopped:
            click.echo(f"Stopped; {kept}", err=True)
            sys.exit(stop.exit_code)


def start_log(level: int = logging.INFO) -> None:
    """Send the log of this program to stderr; that of the libraries only from warnings on."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for package in ("pipeline", "features", "align", "evaluate"):
        logging.getLogger(package).setLevel(level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@dataclass(frozen=True)
class Stage:
    """The recipe that a command is called with, and the options that all stages share."""

    recipe: str
    overrides: tuple[str, ...]
    as_json: bool
    verbose: bool

    def load(self) -> Any:
        """Return the settings of the recipe; the log tells more from here on if it shall."""
        from pipeline.run.config import load_config

        if self.verbose:
            start_log(logging.DEBUG)
        return load_config(self.recipe, self.overrides)

    def run(self, work: Callable[[Any, Any], Any], *, kept: str = SAVED) -> Any:
        """Return what `work(config, stop)` returns; a signal ends it cleanly."""
        from pipeline.run.cpu import keep_freed_memory

        config = self.load()
        keep_freed_memory()
        return until_stopped(lambda stop: work(config, stop), kept=kept)

    def show(self, document: Path, table: Callable[[Any], str], *others: Path) -> None:
        """Print a JSON file that a command wrote; without --json a table of it, and paths."""
        text = document.read_text(encoding="utf-8")
        shown = [text] if self.as_json else [table(json.loads(text)), *map(str, others)]
        click.echo("\n".join(shown))


def stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command a `Stage` as its first argument, and the options that fill it."""

    @functools.wraps(function)
    def command(
        recipe: str, overrides: tuple[str, ...], as_json: bool, verbose: bool, **others: Any
    ) -> Any:
        return function(Stage(recipe, overrides, as_json, verbose), **others)

    options = [
        click.argument("recipe", shell_complete=complete_recipe),
        override,
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--verbose", is_flag=True, help="Log more."),
    ]
    # click keeps the options of a function in reverse; those of decorators below come last
    return functools.reduce(lambda made, option: option(made), reversed(options), command)
