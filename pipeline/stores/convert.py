"""`sail convert` and `sail import-store`: a store in another format or type, and back."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from evaluate.nearest import blocks_of, nearest_among
from features.errors import ConfigError, SourceError, StoreMismatchError
from features.storage.column import Column, encoder_of
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.stores import FORMATS, recognise
from pipeline.stores.arrays import Arrays, WithTable, WrittenRows
from pipeline.stores.blocks import Layout, Rows
from pipeline.stores.mapping import COLUMN, PLAIN, TakenRows
from pipeline.stores.resumable import check_free
from pipeline.stores.writer import StoreRows, complete_columns, write_store


def export_store(store: Place, form: str, out: Path, stop: StopRequest) -> Path:
    """Write a store in another form; it goes on where it was stopped.

    Features in 8 bits are written as the float16 values that they stand for.

    Args:
        store: Every chunk of its columns must be done.
        form: A key of `FORMATS` that stores are written in.
        out: The HDF5 file, of which an older one is replaced; or the folder, which must not be
            there.
        stop: Asked before every chunk.

    Raises:
        StoreError: There is no store, a column has chunks that are not done, there is something at
            `out` that is not replaced, or another process is at it.
        Stopped: A signal came.
    """
    written: Path = FORMATS[form].load().write(StoreRows(FeatureStore.open(store)), out, stop)
    return written


@dataclass(frozen=True)
class Wanted:
    """What a user says of the files."""

    form: str | None = None
    """A key of `FORMATS`; seen from the path if not given."""
    taken: Mapping[str, str] = field(default_factory=dict)
    """Names in the store and of arrays. An empty array drops what would be taken by itself."""
    table: Path | None = None
    """A table with a row for each row, whose columns are arrays `table/<column>`."""
    about: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Facts for the fingerprints, by `image/<encoder>` and `text/<encoder>`."""
    class_names: tuple[str, ...] | None = None
    """Of the labels, in their order."""
    rows_per_chunk: int | None = None
    """Of the store; that of the store that was converted, or 4096, if not given."""


def import_store(path: Path, out: Place, wanted: Wanted, stop: StopRequest) -> Place:
    """Make a store of files; it goes on where it was stopped.

    Args:
        path: A file or folder.
        out: Where the store goes, also under a URL; there must be none.
        wanted: What to take, if `sail convert` did not write the files.
        stop: Asked before every read.

    Raises:
        ConfigError: What is to be taken is not there, or files of `sail convert` are not taken
            whole.
        SourceError: The files are not of the form, or their rows do not belong together.
        StoreError: There is something at `out`.
        Stopped: A signal came.
    """
    check_free(out)
    if not path.exists():
        raise SourceError(
            f"There is nothing at {path}. A file or folder with features was expected. Correct the "
            f"path."
        )
    form = wanted.form or _recognised(path)
    opened: Arrays = FORMATS[form].load().read(path)
    with opened as arrays:
        rows = _rows(path, form, arrays, wanted, stop)
        return write_store(out, rows, stop, origin=path, rows_per_chunk=wanted.rows_per_chunk)


def _recognised(path: Path) -> str:
    found = recognise(path)
    if len(found) != 1:
        suffixes = [suffix for each in FORMATS.values() for suffix in each.suffixes]
        raise ConfigError(
            f"{path} does not tell what it is. A path that ends in one of {', '.join(suffixes)}, "
            f"or a folder of such files of one kind, was expected. Name the form with --from: "
            f"{', '.join(FORMATS)}."
        )
    return found[0]


def _rows(path: Path, form: str, arrays: Arrays, wanted: Wanted, stop: StopRequest) -> Rows:
    if arrays.layout is not None and not wanted.taken:
        return WrittenRows(path, arrays, _checked(path, arrays, arrays.layout))
    if wanted.table is not None:
        arrays = WithTable(arrays, wanted.table)
    every = {**arrays.usual, **wanted.taken}
    taken = {name: array for name, array in every.items() if array}
    source = {
        "kind": form,
        "path": str(path.absolute()),
        "taken": taken,
        **_fingerprint(path, arrays.files, stop),
    }
    if wanted.class_names is not None and "label" not in taken:
        raise ConfigError(
            "There are names of classes, but no labels. An array of labels was expected. Name it "
            "with --take label=ARRAY."
        )
    return TakenRows(
        arrays,
        taken,
        stem=path.stem,
        fingerprints=wanted.about,
        source=source,
        class_names=wanted.class_names,
    )


def _checked(path: Path, arrays: Arrays, layout: Layout) -> Layout:
    """Refuse a layout that its file does not hold, or that is no layout of a store."""
    names = [*layout.columns, *layout.names]
    strange = [name for name in names if not (COLUMN.fullmatch(name) or PLAIN.fullmatch(name))]
    for name in layout.array_names:
        if strange or arrays.shapes.get(name, (None,))[0] != layout.rows:
            raise SourceError(
                f"{path} cannot be read as a feature store: {strange or [name]} should be there "
                f"with {layout.rows} rows. All that `sail convert` wrote was expected. Write it "
                f"again, or say what to take with --take."
            )
    return layout


def _fingerprint(path: Path, files: Sequence[Path], stop: StopRequest) -> dict[str, Any]:
    """Return number, bytes and a sha256 over names and contents of files."""
    every = hashlib.sha256()
    for file in files:
        stop.check()
        is_below = path.is_dir() and file.is_relative_to(path)
        name = file.relative_to(path).as_posix() if is_below else file.name
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        every.update(f"{digest}  {name}\n".encode())
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": every.hexdigest(),
    }


QUERIES, SAMPLE, NEIGHBOURS = 1000, 10_000, 10


def convert_store(
    path: Place, out: Place, dtype: str, stop: StopRequest
) -> dict[str, dict[str, float]]:
    """Write a store again with features of another type, as far as that is not done.

    Args:
        path: The store.
        out: Where the new one goes; a part of it that is there is gone on with.
        dtype: `int8` or `float16`.
        stop: Asked after every chunk.

    Returns:
        For each column how far its features are from those of the store: `relative_error_mean` and
        `_max` (length of the difference / length, over all rows that are ok), `same_neighbours`
        (fraction of the 10 nearest of 10,000 rows by cosine that are the same, over 1000 queries;
        fewer where there are not as many), `bytes` and `bytes_before`.

    Raises:
        StoreError: A column has chunks that are not done, or `out` is a store of something else.
        Stopped: A signal came; what is done is on disk.
    """
    source = FeatureStore.open(path)
    columns = complete_columns(source)
    target = FeatureStore.create(out, source, rows_per_chunk=source.rows_per_chunk)
    losses = {}
    for column in columns:
        target.add_encoder(encoder_of(column.name), column.fingerprint, dim=column.dim, dtype=dtype)
        converted = target.column(column.name)
        if converted.dtype != dtype:
            raise StoreMismatchError(
                str(converted.path), "dtype", found=converted.dtype.name, expected=dtype
            )
        _convert(column, converted, stop)
        losses[column.name] = _loss(column, converted)
    return losses


def _convert(column: Column, converted: Column, stop: StopRequest) -> None:
    status, pending = column.status(), converted.pending()
    converted.remove_leftovers()
    with ProgressLine(column.name, len(pending), "chunks") as line:
        for chunk in pending:
            stop.check()
            start = chunk * column.rows_per_chunk
            part = slice(start, start + column.chunk_rows(chunk))
            converted.write(chunk, column.read(part.start, part.stop), status[part])
            line.advance(1)


def _loss(column: Column, converted: Column) -> dict[str, float]:
    ok = column.ok_rows()
    errors = [
        _relative_errors(column, converted, ok[first : first + column.rows_per_chunk])
        for first in range(0, len(ok), column.rows_per_chunk)
    ]
    every = np.concatenate([np.zeros(0, dtype=np.float32), *errors])
    return {
        "relative_error_mean": float(every.mean()) if len(every) else 0.0,
        "relative_error_max": float(every.max(initial=0)),
        "same_neighbours": _same_neighbours(column, converted, ok),
        "bytes": float(converted.num_chunks * converted.chunk_bytes),
        "bytes_before": float(column.num_chunks * column.chunk_bytes),
    }


def _relative_errors(
    column: Column, converted: Column, rows: Int64[np.ndarray, "rows"]
) -> Float32[np.ndarray, "rows"]:
    before, after = (each.rows_at(rows).astype(np.float32) for each in (column, converted))
    errors: np.ndarray = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
    return errors


def _same_neighbours(column: Column, converted: Column, ok: Int64[np.ndarray, "ok"]) -> float:
    random = np.random.default_rng(0)
    rows = np.sort(random.choice(ok, min(SAMPLE, len(ok)), replace=False))
    queries = random.choice(len(rows), min(QUERIES, len(rows)), replace=False)
    count = min(NEIGHBOURS, len(rows) - 1)
    if count < 1:
        return 1.0
    before, after = (
        nearest_among(features[queries], queries, blocks_of(features), count).rows.tolist()
        for features in (each.rows_at(rows).astype(np.float32) for each in (column, converted))
    )
    same = [len(set(a) & set(b)) for a, b in zip(before, after, strict=True)]
    return float(np.mean(same) / count)
