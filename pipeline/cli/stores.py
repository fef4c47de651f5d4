"""The commands of `sail` that make stores of stores, or of what other programs wrote.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from features.terminal import harmless
from pipeline.cli.options import (
    StorePlace,
    complete_folder,
    json_option,
    say,
    say_json,
    say_paths,
    say_written,
    store_argument,
    until_stopped,
)
from pipeline.stores import FORMATS


class _Place(click.ParamType):  # type: ignore[type-arg]
    """A path or a URL."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        from features.storage.place import as_place

        return as_place(value)


WRITTEN = [name for name, each in FORMATS.items() if each.ending]
COUNT = click.IntRange(min=1)
out_option = click.option(
    "--out", type=_Place(), required=True, metavar="STORE", help="Where it goes."
)


@click.command()
@store_argument
@click.option("--dtype", type=click.Choice(["int8", "float16"]), help="Of the features.")
@click.option("--to", "form", type=click.Choice(WRITTEN), help="Another format.")
@click.option("--out", metavar="PLACE", help="Where it goes.")
@json_option
def convert(
    store: Any, dtype: str | None, form: str | None, out: str | None, as_json: bool
) -> None:
    """Write a store with features in 8 bits, or in another format.

    With --dtype int8 it has half the size and is read in half the time; printed is how far the
    features are from the old ones, and the path of the new store: STORE-int8.zarr beside the old
    one unless --out is given. Train on it with `align.store`.

    With --to it is one HDF5 file, a folder of parquet files with vectors, or a folder as
    clip-retrieval has them (npy and parquet): STORE.h5, STORE-parquet or STORE-clip-retrieval in
    the current folder unless --out is given. `sail import-store` reads all of them back.
    docs/formats.md.

    A call that was stopped or killed is continued by the same call.

    \b
    Examples:
      sail convert runs/demo/features/train.zarr --dtype int8
      sail convert runs/demo/features/train.zarr --to hdf5 --out train.h5
      sail convert runs/demo/features/train.zarr --to clip-retrieval --out train
    """
    if (dtype is None) == (form is None):
        raise click.UsageError("Give either --dtype or --to.")
    from features.storage.place import as_place
    from pipeline.stores.convert import convert_store, export_store
    from pipeline.tables import conversion_table

    if form is not None:
        file = Path(out or f"{store.stem}{FORMATS[form].ending}")
        _write(file, as_json, lambda stop: export_store(store, form, file, stop))
        return
    target = as_place(out) if out else store.parent / f"{store.stem}-{dtype}.zarr"
    losses = until_stopped(lambda stop: convert_store(store, target, str(dtype), stop))
    if as_json:
        say_json({"store": str(target), "columns": losses}, indent=2)
    else:
        say(conversion_table(losses))
        say_paths([target])


@click.command(name="import-store")
@click.argument("path", type=click.Path(path_type=Path))
@out_option
@click.option(
    "--from", "form", type=click.Choice(list(FORMATS)), help="What PATH is, if it does not tell."
)
@click.option("--take", multiple=True, metavar="NAME=ARRAY", help="What becomes what.")
@click.option(
    "--table", type=click.Path(path_type=Path), help="A row for each row: captions, keys."
)
@click.option("--about", multiple=True, metavar="ENCODER.FACT=TEXT", help="For the fingerprint.")
@click.option(
    "--class-names",
    metavar="FILE|LIST",
    help="Of the labels: a text file with one name a line, or a list that ships, as imagenet-1k.",
)
@click.option("--rows-per-chunk", type=COUNT, metavar="N", help="Of the store.")
@json_option
def import_store(
    path: Path,
    out: Any,
    form: str | None,
    take: tuple[str, ...],
    table: Path | None,
    about: tuple[str, ...],
    class_names: str | None,
    rows_per_chunk: int | None,
    as_json: bool,
) -> None:
    """Make a feature store of features that are there already.

    PATH is what `sail convert --to` wrote; or HDF5, .npy, .npz, parquet, safetensors, a folder of
    clip-retrieval, or the .pt folders of the released SAIL code. --take says which array becomes
    what: key, label, group, caption/FIELD, image/ENCODER, text/ENCODER/FIELD. Without it the call
    lists the arrays. Columns of --table (.csv, .tsv, .jsonl, .parquet) are arrays table/COLUMN.
    Nothing is unpickled. A call that was stopped or killed is continued by the same call. Prints
    the path of the store. docs/formats.md.

    \b
    Examples:
      sail import-store train.h5 --out copy.zarr
      sail import-store laion --from clip-retrieval --out laion.zarr
      sail import-store f.h5 --take image/dino=vision --take text/gte/raw=text --out f.zarr
      sail import-store tensor_data --table cc3m.csv --take caption/raw=table/raw_caption \\
        --about image/dinov2-large.pooling=cls+mean --out cc3m.zarr
    """
    from features.class_lists import CLASS_LISTS
    from features.sources.base import read_class_names
    from pipeline.stores.convert import Wanted, import_store

    facts = dict[str, dict[str, str]]()
    for name, text in _pairs("--about", about).items():
        encoder, _, fact = name.rpartition(".")
        facts.setdefault(encoder, {})[fact] = text
    is_list = class_names is None or class_names in CLASS_LISTS
    names = read_class_names(class_names if is_list else Path(str(class_names)))
    wanted = Wanted(form, _pairs("--take", take), table, facts, names, rows_per_chunk)
    _write(out, as_json, lambda stop: import_store(path, out, wanted, stop))


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if wrong := [name for name, separator, _ in pairs if not separator]:
        raise click.UsageError(f"{option} takes NAME=VALUE; got {wrong[0]!r}.")
    return {name: value for name, _, value in pairs}


@click.command()
@click.argument(
    "stores",
    type=StorePlace(),
    nargs=-1,
    required=True,
    metavar="STORE...",
    shell_complete=complete_folder,
)
@out_option
@click.option("--prefix", is_flag=True, help="Put the name of its store before each key.")
@json_option
def merge(stores: tuple[Any, ...], out: Any, prefix: bool, as_json: bool) -> None:
    """Write the rows of several stores behind each other in one.

    They must have the same encoders and caption fields; what differs is named. Keys must be
    unique. Prints the path of the store.

    \b
    Example:
      sail merge runs/a/features/train.zarr runs/b/features/train.zarr --prefix --out both.zarr
    """
    from pipeline.stores.merge import merge_stores

    _write(out, as_json, lambda stop: merge_stores(stores, out, stop, prefix=prefix))


@click.command()
@store_argument
@out_option
@click.option("--keys", type=click.Path(path_type=Path), help="A text file with a key a line.")
@click.option("--query", multiple=True, metavar="NAME=VALUE", help="All that are given must hold.")
@click.option(
    "--deduplicate", type=click.FloatRange(0, 1), metavar="COSINE", help="Keep the first."
)
@click.option("--column", metavar="NAME", help="In which rows are compared; the first by itself.")
@click.option("--random", type=COUNT, metavar="N", help="N rows by chance.")
@click.option("--seed", default=0, show_default=True, help="Of the chance.")
@json_option
def subset(
    store: Any,
    out: Any,
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
    from pipeline.stores.subset import Choice, subset_store

    choice = Choice(keys, query, deduplicate, column, random, seed)
    _write(out, as_json, lambda stop: subset_store(store, out, choice, stop))


@click.command()
@store_argument
@click.option(
    "--rows-per-chunk",
    type=COUNT,
    required=True,
    metavar="N",
    help="Rows of a chunk of the new store.",
)
@out_option
@json_option
def rechunk(store: Any, rows_per_chunk: int, out: Any, as_json: bool) -> None:
    """Write a store again with chunks of another size.

    Prints the path of the store.

    \b
    Example:
      sail rechunk train.zarr --rows-per-chunk 1024 --out finer.zarr
    """
    from pipeline.stores.merge import rechunk_store

    _write(out, as_json, lambda stop: rechunk_store(store, out, rows_per_chunk, stop))


@click.command()
@store_argument
@click.option(
    "--like",
    type=_Place(),
    required=True,
    metavar="STORE",
    help="The other store.",
    shell_complete=complete_folder,
)
@click.option(
    "--memory-mb",
    type=COUNT,
    default=1024,
    show_default=True,
    metavar="N",
    help="MiB of features that are held.",
)
@out_option
@json_option
def reorder(store: Any, like: Any, memory_mb: int, out: Any, as_json: bool) -> None:
    """Write the rows of a store in the order of another one.

    Those that the other has, by their keys, all of which must be there; the chunks get the size of
    the other's too. So the two can be joined: `align.text_store`. Prints the path of the store.

    \b
    Example:
      sail reorder texts.zarr --like images.zarr --out joined.zarr
    """
    from pipeline.stores.merge import reorder_store

    _write(out, as_json, lambda stop: reorder_store(store, out, like, stop, memory_mb=memory_mb))


@click.command()
@store_argument
@click.option(
    "--run",
    metavar="RUN",
    help="Run file or folder of the run that made it, if the store does not lie in that.",
)
@json_option
def repair(store: Any, run: str | None, as_json: bool) -> None:
    """Write again what `sail verify` finds damaged.

    Only these files are written.

    Features are encoded again from the sources of the run, to the same bytes; keys, captions,
    labels and metadata come from its index. Exit 1 with what could not be repaired.

    \b
    Example:
      sail repair runs/demo/features/train.zarr
    """
    from pipeline.stores.repair import repair_store

    done = until_stopped(lambda stop: repair_store(store, stop, run=run))
    left = [str(fault) for fault in done.left]
    if as_json:
        about = {"store": str(store), "encoded": done.encoded, "written": done.written}
        say_json({**about, "left": left})
    else:
        for file in done.written:
            say(f"{file}: written again")
        for column, chunks in done.encoded.items():
            say(f"{column}: encoded again chunks {', '.join(map(str, chunks))}")
    if left:
        for fault in left:
            click.echo(harmless(fault), err=True)
        raise click.ClickException(
            f"{store} is not whole ({len(left)} faults are left, named above with what to do)."
        )
    if not as_json:
        say(f"{store} is whole.")


def _write(out: Any, as_json: bool, work: Callable[[Any], object]) -> None:

    until_stopped(work)
    say_written(out, {"store": str(out)}, as_json=as_json)
