"""The commands of `sail` that begin: one writes a run file, one says what can stand in it.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import sys
from pathlib import Path

import click

from features.terminal import harmless
from pipeline.cli.options import json_option, say, say_json, say_paths


@click.command()
@click.argument("what", default=".", metavar="[PHOTOS | TABLE | SHARDS]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The run file; NAME.toml here if not given."
)
@click.option("--image-encoder", metavar="MODEL", help="Hub id or folder, instead of a choice.")
@click.option("--text-encoder", metavar="MODEL", help="The same for captions.")
@click.option("--yes", is_flag=True, help="Write without asking.")
@json_option
def init(
    what: str,
    out: Path | None,
    image_encoder: str | None,
    text_encoder: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Look at pictures, and write a run file that fits them.

    Takes a folder of pictures, a table that names them, tars, parquet files, or a pattern of these;
    the current folder if none is given. Says what is there, chooses what nobody said (columns,
    encoding, encoders, batch, a tenth to measure on), and prints the path of the run file. An
    earlier one is not replaced.

    \b
    Examples:
      sail init photos
      sail init captions.csv --image-encoder ./dinov2-small --out mine.toml --yes
      sail init 'shards/*.tar'
    """
    if not (yes or sys.stdin.isatty()):
        raise click.UsageError("Nobody can be asked here: give --yes to write the run file.")
    from pipeline.planning.discovery import discover
    from pipeline.planning.encoder_choice import choose_image_encoder, choose_text_encoder
    from pipeline.planning.run_file import RunFile

    found = discover(what)
    path = out or Path(f"{found.name}.toml")
    image = choose_image_encoder(image_encoder, [Path(), path.parent])
    text = choose_text_encoder(text_encoder)
    found.saw.append(f"image encoder {image.model}: {image.facts}")
    found.saw.append(f"text encoder {text.model}: {text.facts}")
    found.saw += [each for each in (image.warning,) if each]
    run_file = RunFile(path, found, image, text)
    for line in found.saw:
        click.echo(harmless(line), err=True)
    if not yes:
        click.echo(harmless(f"\n{run_file.text_of_it()}", lines=True), err=True)
        click.confirm(f"Write {path}?", default=True, abort=True, err=True)
    written = run_file.write()
    if as_json:
        say_json({"run_file": str(path), "saw": found.saw, "written": list(map(str, written))})
        return
    say_paths(written[:1])
    commands = " && ".join(f"sail {stage} {path}" for stage in ("extract", "align", "eval"))
    click.echo(f"Next: {harmless(commands)}, then sail explore {harmless(str(path))}", err=True)


@click.command()
@click.argument("word", default="")
@json_option
def settings(word: str, as_json: bool) -> None:
    """Say what can stand in a run file, with types and defaults.

    WORD is a part of the name of a section, or the name of a setting; all are shown without it.

    \b
    Examples:
      sail settings webdataset
      sail settings align.loss
      sail settings batch_size
    """
    from features.errors import ConfigError
    from pipeline.reference import sections, settings_with
    from pipeline.tables import settings_table

    found = settings_with(word)
    if not found:
        titles = ", ".join(title for title, _ in sections())
        raise ConfigError(
            f"No section or setting is called {word!r}. One of the sections {titles}, or a setting "
            f"of theirs, was expected. Correct the word."
        )
    if as_json:
        say_json(found, indent=2)
    else:
        say(settings_table(found))
