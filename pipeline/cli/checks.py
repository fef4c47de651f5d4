"""The commands of `sail` that look and change nothing.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Any

import click

from features.terminal import harmless
from pipeline.cli.options import (
    Stage,
    complete_recipe,
    count_of,
    json_option,
    override,
    say,
    say_json,
    stage,
    store_argument,
)


@click.command()
@stage
@click.option("--rows", metavar="COUNT", help="Rows of each training split, such as 23M.")
@click.option(
    "--seconds",
    default=20.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="What measuring may take.",
)
@click.option(
    "--price", type=click.FloatRange(min=0), metavar="EUROS", help="Of one hour of a GPU."
)
def plan(run: Stage, rows: str | None, seconds: float, price: float | None) -> None:
    """Say what a run will cost: rows, bytes, hours of both stages.

    Encoders and data that are on this machine are measured; the hub is not asked. Hours on named
    GPUs are computed from the work of the encoders.

    \b
    Examples:
      sail plan my.toml
      sail plan sail --rows 23M --price 2.5
    """
    config = run.load()
    count = None if rows is None else count_of(rows)
    # torch loads here: a fault in the recipe is told before
    from pipeline.planning.budget import plan_run
    from pipeline.tables import plan_table

    description = plan_run(config, rows=count, seconds=seconds, price=price)
    if run.as_json:
        say_json(description, indent=2)
    else:
        say(plan_table(description))


@click.command()
@click.argument("recipe", required=False, shell_complete=complete_recipe)
@override
@json_option
def doctor(recipe: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say whether this machine has what a run needs.

    Looks at versions, devices, faiss, disk and decoding; with RECIPE also at its data, encoders and
    folder. Exit 1 if something needed is broken.

    \b
    Examples:
      sail doctor
      sail doctor my.toml --json
    """
    from pipeline.run.config import load_config

    if overrides and recipe is None:
        raise click.UsageError("--set changes a recipe: name it.")
    config = load_config(recipe, overrides) if recipe else None
    from pipeline.planning.doctor import examine
    from pipeline.tables import doctor_table

    examination = examine(config)
    if as_json:
        say_json(examination, indent=2)
    else:
        say(doctor_table(examination))
    if not examination["ok"]:
        sys.exit(1)


@click.command()
@click.argument("model", metavar="NAME")
@click.option("--revision", help="Commit or tag of the hub repository.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the encoder, as in a recipe; may be repeated.",
)
@click.option(
    "--check", "is_checked", is_flag=True, help="Encode 20 inputs, and compare with its reference."
)
@json_option
def encoders(
    model: str, revision: str | None, settings: tuple[str, ...], is_checked: bool, as_json: bool
) -> None:
    """Say how an encoder will be used, and what says so.

    NAME is what `model` of an encoder can be: a hub id, a folder, `bundled:minilm`, ... Each value
    stands beside the file that says it. Weights are not read. Of a model of two towers both are
    shown.

    With --check it is loaded, and 20 pictures or texts are encoded in float32 on the CPU, by this
    program and by the library that the model was written for (sentence-transformers, transformers,
    timm, open_clip), where that is installed. Exit 1 where they differ.

    \b
    Examples:
      sail encoders bundled:minilm --check
      sail encoders BAAI/bge-small-en-v1.5 --json
      sail encoders ./my-llm --set pooling=last --set end_token=true
    """
    from pipeline.planning.encoders import plans_of
    from pipeline.tables import plans_table

    planned = plans_of(model, revision, settings)
    plans, is_equal = [each.plan.as_dict() for each in planned], True
    if is_checked:
        from pipeline.planning.encoder_check import compare

        for each, shown in zip(planned, plans, strict=True):
            found = compare(each.plan, each.config)
            shown["check"] = found._asdict() | {"equal": found.is_equal}
            is_equal &= found.is_equal
    if as_json:
        say_json(plans, indent=2)
    else:
        say(plans_table(plans))
    if not is_equal:
        sys.exit(1)


@click.command()
@store_argument
@click.option("--row", type=int, help="Show this row instead of the whole.")
@click.option(
    "--rows",
    default="256k",
    show_default=True,
    metavar="COUNT",
    help="About how many rows are read for statistics.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: everything, and each dimension.")
def inspect(store: Any, row: int | None, rows: str, as_json: bool) -> None:
    """Show what a store holds: rows, statuses, statistics.

    STORE is a folder, or a URL (s3://, gs://, http(s)://, hf://). Statistics are of whole chunks,
    evenly spread; of all rows where there are no more. docs/store.md says what they mean. With
    --row a terminal shows the image too, where the store lies in the folder of its run.

    \b
    Examples:
      sail inspect runs/demo/features/train.zarr
      sail inspect runs/demo/features/train.zarr --row 7 --json
    """
    from pipeline.stores.inspect import describe_row, describe_store
    from pipeline.tables import rendered, row_table, store_table

    if row is None:
        description = describe_store(store, rows_read=count_of(rows))
    else:
        description = describe_row(store, row)
    if as_json:
        say_json(description, indent=2)
        return
    say(store_table(description) if row is None else row_table(description))
    if row is not None and sys.stdout.isatty():
        from pipeline.stores.inspect import picture_of

        if picture := picture_of(store, row):
            say(rendered(picture))


@click.command()
@store_argument
@click.option(
    "--seal",
    is_flag=True,
    help="Make a whole store of version 1 one of version 2, with an identity for every chunk.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the faults as JSON.")
def verify(store: Any, seal: bool, as_json: bool) -> None:
    """Check every file of a store; exit 1 with what is wrong.

    Identities, checksums, lengths, counts and keys are checked.

    A store of format version 1 says of no chunk which one it is: in it a chunk in the place of
    another is not found. With --seal it is verified, and then every chunk gets its identity.

    \b
    Examples:
      sail verify runs/demo/features/train.zarr
      sail verify old.zarr --seal
      sail verify runs/demo/features/train.zarr --json | jq '.faults[]'
    """
    from features.store import FeatureStore
    from pipeline.stores.verify import find_faults, seal_store

    if seal and not isinstance(store, Path):
        raise click.UsageError("--seal changes a store on local disk; copy it there first.")
    found = seal_store(store) if seal else find_faults(store)
    faults = [str(fault) for fault in found]
    if as_json:
        say_json({"store": str(store), "faults": faults})
    if faults:
        for fault in faults:
            click.echo(harmless(fault), err=True)
        raise click.ClickException(
            f"{store} is not whole ({len(faults)} faults, named above with what to do)."
        )
    if not as_json:
        is_proven = FeatureStore.open(store).manifest is not None
        unproven = (
            ", as far as format version 1 can tell: a chunk in the place of another is not found. "
            "`sail verify --seal` gives each chunk an identity"
        )
        say(f"{store} is whole{'' if is_proven else unproven}.")
