"""A feature store as one HDF5 file and back, for tools that read HDF5 and not Zarr.

The file has the tree of the store (docs/store.md): a dataset for every array, chunked by the same
rows, and every attribute as JSON text. Rows go over one chunk at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

from features.column import Column, create_column
from features.errors import SourceError, StoreError
from features.partial import appearing
from features.publish import new_group
from features.status import Status
from features.storage.place import Place
from features.store import FORMAT, FORMAT_VERSION, NUMBERS, STRINGS, FeatureStore
from pipeline.conversion import complete_columns
from pipeline.interrupt import Stopped, StopRequest
from pipeline.progress import ProgressLine

TEXT = h5py.string_dtype("utf-8")


def export_hdf5(path: Place, out: Path, stop: StopRequest) -> Path:
    """Write a store as an HDF5 file: all of it, or nothing.

    Features in 8 bits are written as the float16 values that they stand for.

    Args:
        path: The store; every chunk of its columns must be done.
        out: The file; an older one is replaced.
        stop: Asked after every chunk.

    Raises:
        StoreError: There is no store, or a column has chunks that are not done.
        Stopped: A signal came; nothing was written.
    """
    store = FeatureStore.open(path)
    columns = complete_columns(store)
    chunks = 1 + len(columns)
    with (
        appearing(out) as partial,
        h5py.File(partial, "w") as file,
        ProgressLine(out.name, chunks * store.num_chunks, "chunks") as line,
    ):
        _write_attributes(file, store.attributes)
        arrays = _row_arrays(file, store)
        for part in _parts(store.rows, store.rows_per_chunk, stop):
            for dataset, read in arrays:
                dataset[part] = read(part)
            line.advance(1)
        for column in columns:
            _write_column(file, column, stop, line)
    return out


def import_hdf5(path: Path, out: Place, stop: StopRequest) -> Place:
    """Make a store of an HDF5 file that `export_hdf5` wrote: all of it, or nothing.

    Args:
        path: The file.
        out: Where the store goes, also under a URL; there must be none.
        stop: Asked after every chunk.

    Raises:
        SourceError: It is no such file, or its keys are not those that were written.
        StoreError: There is something at `out`.
        Stopped: A signal came; nothing was written.
    """
    if FeatureStore.is_at(out):
        raise StoreError(
            f"There is something at {out}. A place without a store was expected. Give another "
            f"--out, or delete it."
        )
    with _opened(path) as file, new_group(out, store=out) as folder:
        attributes = _attributes(file)
        rows, size = attributes["rows"], attributes["rows_per_chunk"]
        names, columns = _contents(path, file, rows)
        group = zarr.create_group(folder, attributes=attributes)
        with ProgressLine(out.name, (1 + len(columns)) * -(-rows // size), "chunks") as line:
            digest = _read_rows(file, group, names, (rows, size), stop, line)
            if digest != (written := attributes.get("keys_sha256")):
                raise SourceError(
                    f"{path} has keys of sha256 {digest}, but says {written}. "
                    f"The keys that were written were expected. Export the store again."
                )
            for kind in ("image", "text"):
                group.require_group(kind)
            for name in columns:
                _read_column(file, folder, name, (rows, size), stop, line)
    return out


def _row_arrays(
    file: h5py.File, store: FeatureStore
) -> list[tuple[h5py.Dataset, Callable[[slice], np.ndarray]]]:
    """Make the datasets that belong to no encoder; each comes with what reads its rows."""

    def dataset(name: str, dtype: Any) -> h5py.Dataset:
        chunks = (min(store.rows, store.rows_per_chunk),)
        return file.create_dataset(name, (store.rows,), dtype, chunks=chunks)

    def captions(field: str) -> Callable[[slice], np.ndarray]:
        return lambda part: store.captions(field, part.start, part.stop).astype(object)

    arrays: list[tuple[h5py.Dataset, Callable[[slice], np.ndarray]]] = [
        (dataset("key", TEXT), lambda part: store.keys(part.start, part.stop).astype(object)),
        *((dataset(f"caption/{field}", TEXT), captions(field)) for field in store.fields),
    ]
    for name, numbers in [("label", store.labels()), ("group", store.groups())]:
        if numbers is not None:
            arrays.append((dataset(name, np.int32), numbers.__getitem__))
    if store.class_names is not None:
        _write_attributes(file["label"], {"class_names": list(store.class_names)})
    return arrays


def _write_column(file: h5py.File, column: Column, stop: StopRequest, line: ProgressLine) -> None:
    encoder = file.require_group("/".join(column.name.split("/")[:2]))
    if not encoder.attrs:
        _write_attributes(encoder, column.fingerprint)
    chunk = min(column.rows, column.rows_per_chunk)
    target = file.require_group(column.name)
    features = target.create_dataset(
        "features", (column.rows, column.dim), np.float16, chunks=(chunk, column.dim)
    )
    codes = target.create_dataset("status", (column.rows,), np.uint8, chunks=(chunk,))
    _write_attributes(codes, {"codes": {status.label: int(status) for status in Status}})
    status = column.status()
    for part in _parts(column.rows, column.rows_per_chunk, stop):
        features[part] = column.read(part.start, part.stop)
        codes[part] = status[part]
        line.advance(1)


def _read_rows(
    file: h5py.File,
    group: zarr.Group,
    names: list[str],
    sizes: tuple[int, int],
    stop: StopRequest,
    line: ProgressLine,
) -> str:
    """Copy the arrays that belong to no encoder; return the digest of the keys."""
    rows, size = sizes
    for name in names:
        is_number = name in NUMBERS
        group.create_array(
            name,
            shape=(rows,),
            chunks=(size,),
            dtype="int32" if is_number else "string",
            fill_value=-1 if is_number else "",
            dimension_names=["row"],
            attributes=_attributes(file[name]),
        )
    digest = hashlib.sha256()
    for part in _parts(rows, size, stop):
        for name in names:
            values = file[name][part] if name in NUMBERS else file[name].asstr()[part]
            if name == "key":
                digest.update("".join(f"{key}\n" for key in values).encode())
            array = group[name]
            array[part] = values if name in NUMBERS else values.astype(STRINGS)  # type: ignore[index]
        line.advance(1)
    return digest.hexdigest()


def _read_column(
    file: h5py.File,
    folder: Path,
    name: str,
    sizes: tuple[int, int],
    stop: StopRequest,
    line: ProgressLine,
) -> None:
    rows, size = sizes
    source = file[name]
    encoder = "/".join(name.split("/")[:2])
    root = zarr.open_group(folder, mode="r+")
    root.require_group(encoder).attrs.update(_attributes(file[encoder]))
    create_column(root.require_group(name), rows, source["features"].shape[1], size)
    column = Column(folder, name)
    for chunk, part in enumerate(_parts(rows, size, stop)):
        column.write(chunk, source["features"][part], source["status"][part])
        line.advance(1)


def _parts(rows: int, size: int, stop: StopRequest) -> Iterator[slice]:
    for start in range(0, rows, size):
        if stop():
            raise Stopped
        yield slice(start, min(start + size, rows))


def _contents(path: Path, file: h5py.File, rows: int) -> tuple[list[str], list[str]]:
    """Return the names of the datasets that belong to no encoder, and of the columns.

    Raises:
        SourceError: A dataset has other rows, or its values are in another file.
    """
    found = list[str]()

    def see(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.is_virtual or item.external:
            raise _not_ours(path, f"{name} keeps its values in another file")
        if item.shape[:1] != (rows,):
            raise _not_ours(path, f"{name} has shape {item.shape}, not {rows} rows")
        if name.endswith("/features") and (item.ndim != 2 or item.dtype != np.float16):
            raise _not_ours(path, f"{name} is {item.dtype} of shape {item.shape}, not float16 rows")
        found.append(name)

    file.visititems(see)  # follows no link
    columns = [name.rpartition("/")[0] for name in found if name.endswith("/features")]
    if missing := [name for name in columns if f"{name}/status" not in found]:
        raise _not_ours(path, f"{missing[0]} has no status")
    if "key" not in found:
        raise _not_ours(path, "it has no key")
    own = [name for name in found if name in ("key", *NUMBERS) or name.startswith("caption/")]
    return own, columns


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _not_ours(path, str(error)) from error
    with file:
        kind = {name: file.attrs.get(name) for name in ("format", "format_version")}
        expected = {"format": json.dumps(FORMAT), "format_version": json.dumps(FORMAT_VERSION)}
        if kind != expected:
            raise _not_ours(path, f"it has {kind}")
        try:
            attributes = _attributes(file)
        except (ValueError, TypeError) as error:
            raise _not_ours(path, f"its attributes are not JSON ({error})") from error
        sizes = [attributes.get(name) for name in ("rows", "rows_per_chunk")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise _not_ours(path, f"it has rows and rows_per_chunk = {sizes}")
        yield file


def _not_ours(path: Path, why: str) -> SourceError:
    return SourceError(
        f"{path} cannot be read as a feature store: {why}. An HDF5 file that `sail convert --to "
        f"hdf5` wrote was expected. Correct the path, or write the file again."
    )


def _write_attributes(target: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        target.attrs[name] = json.dumps(value, ensure_ascii=False)


def _attributes(source: Any) -> dict[str, Any]:
    names = list(source.attrs)  # an iterator of h5py that is left half-way keeps its global lock
    return {name: json.loads(source.attrs[name]) for name in names}
