"""Stores in other forms, and stores made of stores.

`FORMATS` has what a store can be converted to and imported from. Each is a module here with the
verbs `read(path)`, which gives `arrays.Arrays`, and where stores can be written,
`write(rows, out, stop)`. That writes the rows of a store (`writer.StoreRows`) to a file or folder
`out`, in whole chunks; asked before each, `stop` raises `Stopped` after a signal. What is written
appears when all of it is there, and the same call goes on where it was stopped. `StoreError` is
raised where there is something at `out` already, or another process is at it.

`blocks.Rows` describes a store before it is written: a `Layout`, and blocks of rows. A store is
read as one (`writer.StoreRows`), and so is a file that `sail convert` wrote; `mapping` makes one of
the arrays in other programs' files. `writer.write_store` writes the store, `resumable` keeps what
is not yet whole.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Format:
    """What is known of a format before its module, and the library behind it, is imported."""

    module: str
    suffixes: tuple[str, ...] = ()
    """Of its files, by which a path is recognised."""
    folders: tuple[str, ...] = ()
    """In a folder of this format, by any of which it is recognised before all others."""
    ending: str | None = None
    """What the name of a converted store ends in; None where stores are only imported."""

    def load(self) -> Any:
        """Import the module, which has `read` and, if there is an `ending`, `write`."""
        return import_module(f"pipeline.stores.{self.module}")


FORMATS = {
    "hdf5": Format("hdf5", suffixes=(".h5", ".hdf5"), ending=".h5"),
    "npy": Format("npy", suffixes=(".npy",)),
    "npz": Format("npy", suffixes=(".npz",)),
    "parquet": Format("parquet", suffixes=(".parquet",), ending="-parquet"),
    "safetensors": Format("safetensors", suffixes=(".safetensors",)),
    "clip-retrieval": Format(
        "clip_retrieval", folders=("img_emb", "text_emb"), ending="-clip-retrieval"
    ),
    "sail-pt": Format("released_sail", suffixes=(".pt",)),
}


def recognise(path: Path) -> list[str]:
    """Return the formats that a file or folder looks like."""
    suffixes = {path.suffix}
    if path.is_dir():
        marked = [
            name
            for name, each in FORMATS.items()
            if any((path / folder).is_dir() for folder in each.folders)
        ]
        if marked:
            return marked
        suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    return [name for name, each in FORMATS.items() if suffixes.intersection(each.suffixes)]
