"""`sail import-store`: files of any known form become a store."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features.errors import ConfigError, SourceError
from features.storage.place import Place
from pipeline.formats.arrays import Arrays, WrittenRows
from pipeline.formats.clip_retrieval import ClipRetrievalArrays
from pipeline.formats.hdf5 import Hdf5Arrays
from pipeline.formats.npy import NpyArrays
from pipeline.formats.parquet import ParquetArrays
from pipeline.formats.released_sail import ReleasedArrays
from pipeline.formats.rows import Layout, Rows
from pipeline.formats.store import write_store
from pipeline.formats.table import WithTable
from pipeline.formats.taken import COLUMN, PLAIN, TakenRows
from pipeline.formats.tensors import SafetensorsArrays
from pipeline.formats.unfinished import check_free
from pipeline.interrupt import Stopped, StopRequest

FORMS: Mapping[str, Callable[[Path], Any]] = {
    "hdf5": Hdf5Arrays,
    "npy": NpyArrays,
    "npz": NpyArrays,
    "parquet": ParquetArrays,
    "safetensors": SafetensorsArrays,
    "clip-retrieval": ClipRetrievalArrays,
    "sail-pt": ReleasedArrays,
}
SUFFIXES = {
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".npy": "npy",
    ".npz": "npz",
    ".parquet": "parquet",
    ".safetensors": "safetensors",
    ".pt": "sail-pt",
}


@dataclass(frozen=True)
class Wanted:
    """What a user says of the files."""

    form: str | None = None
    """One of `FORMS`; seen from the path if not given."""
    taken: Mapping[str, str] = field(default_factory=dict)
    """Names in the store and of arrays. An empty array drops what would be taken by itself."""
    table: Path | None = None
    """A table with a row for each row, whose columns are arrays `table/<column>`."""
    about: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Facts for the fingerprints, by `image/<encoder>` and `text/<encoder>`."""
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
    form = wanted.form or form_of(path)
    opened: AbstractContextManager[Any] = FORMS[form](path)
    with opened:
        arrays: Any = opened
        rows = _rows(path, form, arrays, wanted, stop)
        return write_store(out, rows, stop, origin=path, rows_per_chunk=wanted.rows_per_chunk)


def form_of(path: Path) -> str:
    """Return the form that a path looks like.

    Raises:
        ConfigError: It does not tell.
    """
    if path.is_dir():
        if (path / "img_emb").is_dir() or (path / "text_emb").is_dir():
            return "clip-retrieval"
        found = {SUFFIXES.get(each.suffix) for each in path.rglob("*") if each.is_file()} - {None}
    else:
        found = {SUFFIXES.get(path.suffix)} - {None}
    if len(found) != 1:
        raise ConfigError(
            f"{path} does not tell what it is. A path that ends in one of {', '.join(SUFFIXES)}, "
            f"or a folder of such files of one kind, was expected. Name the form with --from: "
            f"{', '.join(FORMS)}."
        )
    return str(found.pop())


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
    return TakenRows(arrays, taken, stem=path.stem, fingerprints=wanted.about, source=source)


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
        if stop():
            raise Stopped
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
