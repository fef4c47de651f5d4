"""The commands of `sail` that write stores in other forms, and read them back.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from pathlib import Path

import click

from pipeline.options import until_stopped


@click.command()
@click.argument("store")
@click.option("--dtype", type=click.Choice(["int8", "float16"]), help="Of the features.")
@click.option("--to", "form", type=click.Choice(["hdf5"]), help="Another file format.")
@click.option("--out", metavar="PLACE", help="Where the new store goes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def convert(
    store: str, dtype: str | None, form: str | None, out: str | None, as_json: bool
) -> None:
    """Write a store again: with features in 8 bits, or as one HDF5 file.

    With --dtype int8 it has half the size and is read in half the time; printed is how far the
    features are from the old ones, and the path of the new store: STORE-int8.zarr beside the old
    one unless --out is given. A call that was stopped is continued by the same call. Train on it
    with `align.store`.

    With --to hdf5 it is a file that h5py, MATLAB or Julia open, STORE.h5 in the current folder
    unless --out is given; `sail import-store` reads it back.

    \b
    Examples:
      sail convert runs/demo/features/train.zarr --dtype int8
      sail convert runs/demo/features/train.zarr --to hdf5 --out train.h5
    """
    if (dtype is None) == (form is None):
        raise click.UsageError("Give either --dtype or --to.")
    from features.storage.place import as_place
    from pipeline.conversion import convert_store
    from pipeline.progress import start_log
    from pipeline.tables import conversion_table

    start_log(verbose=False)
    source = as_place(store)
    if dtype is None:
        from pipeline.hdf5 import export_hdf5

        file = Path(out or f"{source.stem}.h5")
        until_stopped(lambda stop: export_hdf5(source, file, stop), kept="nothing was written.")
        click.echo(json.dumps({"store": str(file)}) if as_json else str(file))
        return
    target = as_place(out) if out else source.parent / f"{source.stem}-{dtype}.zarr"
    losses = until_stopped(lambda stop: convert_store(source, target, dtype, stop))
    if as_json:
        click.echo(json.dumps({"store": str(target), "columns": losses}, indent=2))
    else:
        click.echo(conversion_table(losses))
        click.echo(str(target))


@click.command(name="import-store")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="STORE", help="Where the store goes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def import_store(file: Path, out: str, as_json: bool) -> None:
    """Make a feature store of an HDF5 file that `sail convert --to hdf5` wrote.

    The keys are checked against their sha256. Prints the path of the store.

    \b
    Example:
      sail import-store train.h5 --out copy.zarr
    """
    from features.storage.place import as_place
    from pipeline.hdf5 import import_hdf5
    from pipeline.progress import start_log

    start_log(verbose=False)
    target = as_place(out)
    until_stopped(lambda stop: import_hdf5(file, target, stop), kept="nothing was written.")
    click.echo(json.dumps({"store": str(target)}) if as_json else str(target))
