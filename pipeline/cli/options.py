"""What commands of `sail` share: options, and the clean end by a signal."""

import functools
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from features.terminal import harmless

SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
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
        if key.strip() in ("rows", "align.rows"):  # 30,1k, as for `sail scaling`
            key, values = "align.rows", [str(count_of(value)) for value in values]
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


class NamedRun(click.ParamType):  # type: ignore[type-arg]
    """The folder of a run, also where its run file or the name of its recipe is given."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002, D102
        from pipeline.run.config import folder_of_run

        return folder_of_run(str(value))


class StorePlace(click.ParamType):  # type: ignore[type-arg]
    """A store, or the one store of a run."""

    name = "store"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002, D102
        from features.storage.place import as_place
        from pipeline.run.folder import store_of_run

        place = as_place(value)
        return store_of_run(value) if isinstance(place, Path) else place


run_argument = click.argument("run", type=NamedRun(), shell_complete=complete_recipe)
store_argument = click.argument("store", type=StorePlace(), shell_complete=complete_folder)


def until_stopped(work: Callable[[Any], Any], *, kept: str = SAVED) -> Any:
    """Return what work returns; where a signal ends it cleanly, exit with the signal's code."""
    from pipeline.interrupt import Stopped, stop_on_signal

    with stop_on_signal() as stop:
        try:
            return work(stop)
        except Stopped:
            click.echo(f"Stopped; {kept}", err=True)
            sys.exit(stop.exit_code)


COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
PACKAGES = ("pipeline", "features", "align", "evaluate")


def say(text: str) -> None:
    """Print the result of a command, in which no text of strangers steers the terminal."""
    parts = COLOUR.split(text) if sys.stdout.isatty() else [text]  # colours are those of our tables
    click.echo("".join(p if COLOUR.fullmatch(p) else harmless(p, lines=True) for p in parts))


def say_json(document: object, *, indent: int | None = None) -> None:
    """Print a JSON document, in which no text of strangers steers the terminal."""
    click.echo(harmless(json.dumps(document, indent=indent, ensure_ascii=False), lines=True))


def say_paths(paths: Iterable[object]) -> None:
    """Print paths, one a line: to a script with the very bytes that they have."""
    for path in map(str, paths):
        click.echo(harmless(path) if sys.stdout.isatty() else path)


def say_written(path: object, document: object, *, as_json: bool) -> None:
    """Print the path of what was written, or what else is known of it as JSON."""
    if as_json:
        say_json(document)
    else:
        say_paths([path])


class _Line(logging.Formatter):
    """A line of the log: text of strangers begins none of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is given
        ours = record.name.partition(".")[0] in PACKAGES
        return harmless(super().formatMessage(record), lines=not ours)


def start_log(level: int = logging.INFO) -> None:
    """Send the log of this program to stderr; that of the libraries only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path keeps its bytes, and no letter that the locale lacks ends a command.
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
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

    def show(self, document: Path, table: Callable[[Any], str], *others: Path) -> Any:
        """Print a JSON file that a command wrote; without --json a table of it, and paths.

        Returns:
            What the file says.
        """
        from features.storage.reading import Expected, read_json

        remedy = "Delete it, and run the command again."
        found: dict[str, Any] = read_json(
            document, dict[str, Any], Expected("A JSON object", remedy)
        )
        if self.as_json:
            say_json(found, indent=1)
        else:
            say(table(found))
            say_paths(others)
        return found


def optional_stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do as `stage` does, where the recipe may be missing: it is then empty."""
    return stage(function, required=False)


def stage(function: Callable[..., Any], *, required: bool = True) -> Callable[..., Any]:
    """Give a command a `Stage` as its first argument, and the options that fill it."""

    @functools.wraps(function)
    def command(
        recipe: str | None, overrides: tuple[str, ...], as_json: bool, verbose: bool, **others: Any
    ) -> Any:
        return function(Stage(recipe or "", overrides, as_json, verbose), **others)

    options = [
        click.argument("recipe", shell_complete=complete_recipe, required=required),
        override,
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--verbose", is_flag=True, help="Log more."),
    ]
    # click keeps the options of a function in reverse; those of decorators below come last
    return functools.reduce(lambda made, option: option(made), reversed(options), command)
