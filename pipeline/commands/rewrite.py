"""The commands of `sail` that make stores of stores.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import complete_folder, store_argument, until_stopped

out_option = click.option("--out", required=True, metavar="STORE", help="Where it goes.")
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument(
    "stores", nargs=-1, required=True, metavar="STORE...", shell_complete=complete_folder
)
@out_option
@click.option("--prefix", is_flag=True, help="Put the name of its store before each key.")
@as_json_option
def merge(stores: tuple[str, ...], out: str, prefix: bool, as_json: bool) -> None:
    """Write the rows of several stores behind each other in one.

    They must have the same encoders and caption fields; what differs is named. Keys must be
    unique. Prints the path of the store.

    \b
    Example:
      sail merge runs/cc3m/features/train.zarr runs/cc12m/features/train.zarr --out both.zarr
    """
    from features.storage.place import as_place
    from pipeline.rewrite.merge import merge_stores

    places = [as_place(store) for store in stores]
    _write(out, as_json, lambda place, stop: merge_stores(places, place, stop, prefix=prefix))


@click.command()
@store_argument
@out_option
@click.option("--keys", type=click.Path(path_type=Path), help="A text file with a key a line.")
@click.option("--query", multiple=True, metavar="NAME=VALUE", help="All that are given must hold.")
@click.option(
    "--deduplicate", type=click.FloatRange(0, 1), metavar="COSINE", help="Keep the first."
)
@click.option("--column", metavar="NAME", help="In which rows are compared; the first by itself.")
@click.option("--random", type=click.IntRange(min=1), metavar="N", help="N rows by chance.")
@click.option("--seed", default=0, show_default=True, help="Of the chance.")
@as_json_option
def subset(
    store: str,
    out: str,
    keys: Path | None,
    query: tuple[str, ...],
    deduplicate: float | None,
    column: str | None,
    random: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write some rows of a store as a store of their own.

    Rows keep their order. Each option narrows what those before it left, in the order shown below.
    A query is NAME=VALUE, or NAME~PART for a part of a text in any case; NAME is key,
    caption/FIELD, label, group, or a column, whose VALUE is a status (ok). Of rows that are alike
    --deduplicate keeps the first; every row is compared with all before it. Prints the path of the
    store.

    \b
    Examples:
      sail subset train.zarr --query label=cat --query image/dinov2=ok --out cats.zarr
      sail subset train.zarr --query "caption/long~red circle" --out red.zarr
      sail subset train.zarr --deduplicate 0.98 --random 10000 --seed 1 --out small.zarr
    """
    if keys is None and not query and deduplicate is None and random is None:
        raise click.UsageError("Give --keys, --query, --deduplicate or --random.")
    from features.storage.place import as_place
    from pipeline.rewrite.subset import Choice, subset_store

    choice = Choice(keys, query, deduplicate, column, random, seed)
    _write(out, as_json, lambda place, stop: subset_store(as_place(store), place, choice, stop))


@click.command()
@store_argument
@click.option(
    "--rows-per-chunk",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="Rows of a chunk of the new store.",
)
@out_option
@as_json_option
def rechunk(store: str, rows_per_chunk: int, out: str, as_json: bool) -> None:
    """Write a store again with chunks of another size.

    Prints the path of the store.

    \b
    Example:
      sail rechunk train.zarr --rows-per-chunk 1024 --out finer.zarr
    """
    from features.storage.place import as_place
    from pipeline.rewrite.merge import rechunk_store

    _write(
        out,
        as_json,
        lambda place, stop: rechunk_store(as_place(store), place, rows_per_chunk, stop),
    )


@click.command()
@store_argument
@click.option(
    "--like",
    required=True,
    metavar="STORE",
    help="The other store.",
    shell_complete=complete_folder,
)
@click.option(
    "--memory-mb",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="MiB of features that are held.",
)
@out_option
@as_json_option
def reorder(store: str, like: str, memory_mb: int, out: str, as_json: bool) -> None:
    """Write the rows of a store in the order of another one.

    Those that the other has, by their keys, all of which must be there; the chunks get the size of
    the other's too. So the two can be joined: `align.text_store`. Prints the path of the store.

    \b
    Example:
      sail reorder texts.zarr --like images.zarr --out joined.zarr
    """
    from features.storage.place import as_place
    from pipeline.rewrite.reorder import reorder_store

    _write(
        out,
        as_json,
        lambda place, stop: reorder_store(
            as_place(store), place, as_place(like), stop, memory_mb=memory_mb
        ),
    )


def _write(out: str, as_json: bool, work: Callable[[Any, Any], object]) -> None:
    from features.storage.place import as_place
    from pipeline.progress import start_log

    start_log(verbose=False)
    place = as_place(out)
    until_stopped(lambda stop: work(place, stop))
    click.echo(json.dumps({"store": str(place)}) if as_json else str(place))
