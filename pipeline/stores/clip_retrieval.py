"""The folder that `clip-retrieval inference` writes: `img_emb`, `text_emb`, `metadata`.

`img_emb/img_emb_0.npy`, `text_emb/text_emb_0.npy` and `metadata/metadata_0.parquet` hold the same
rows, a million of them each. Of a store, the first image column and the first text column go there,
further columns to `columns/<name>`, and everything else into the metadata.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.storage.rows import NUMBERS
from pipeline.interrupt import StopRequest
from pipeline.stores.arrays import Arrays, Reader, SequentialArray, of_form
from pipeline.stores.blocks import Block, Layout, Rows
from pipeline.stores.npy import NpyArray, open_npy, write_header
from pipeline.stores.parquet import LAYOUT_KEY, ParquetArrays, as_batch
from pipeline.stores.writer import write_parts

ROWS_PER_FILE = 1_000_000
MISSING_SHOWN = 10
logger = logging.getLogger(__name__)
EXPECTED = of_form("A folder as `clip-retrieval inference` writes it")


def write(rows: Rows, out: Path, stop: StopRequest, *, rows_per_file: int = ROWS_PER_FILE) -> Path:
    """Write rows as such a folder; a file has at most `rows_per_file`, in whole chunks."""
    layout, size = rows.layout, rows.layout.rows_per_chunk
    files = -(-layout.rows // (max(1, rows_per_file // size) * size))
    digits = len(str(files - 1))
    begin = partial(_ClipRetrievalPart, layout, digits)
    return write_parts(rows, out, "clip-retrieval", rows_per_file, stop, begin)


class ClipRetrievalArrays(Arrays):
    """Its embeddings, `img_emb` and `text_emb`, and the columns of its metadata by their names.

    Files of the same rows must have as many of them.
    """

    expected = EXPECTED

    def _open(self, path: Path, stack: ExitStack) -> None:
        metadata = ParquetArrays(path / "metadata")
        stack.push(metadata)
        folders = [path / "img_emb", path / "text_emb", *sorted((path / "columns").glob("*"))]
        vectors = {
            folder.name: [NpyArray(file, *open_npy(file, stack)) for file in found]
            for folder in folders
            if (found := sorted(folder.glob("*.npy")))
        }
        _check(path, metadata, vectors)
        _tell_what_is_missing(path, metadata, vectors)
        self.layout = metadata.layout
        self.files = [
            file for each in (path / "metadata", *folders) for file in sorted(each.glob("*.*"))
        ]
        theirs: dict[str, tuple[tuple[int, ...], Reader]] = {
            name: (shape, partial(metadata.read, name)) for name, shape in metadata.shapes.items()
        }
        for name, arrays in vectors.items():
            pieces = SequentialArray(partial(_pieces, arrays))
            theirs[name] = ((metadata.rows, arrays[0].shape[1]), pieces.read)
        names = _names(self.layout) if self.layout else {}
        ours = {name: theirs[their] for name, their in names.items() if their in theirs}
        for name, (shape, read) in (ours or theirs).items():
            self._add(name, shape, read)
        # Both embeddings as those of an encoder `clip`, the captions, and img2dataset's keys.
        usual = {
            "image/clip": "img_emb",
            "text/clip/caption": "text_emb",
            "caption/caption": "caption",
            "key": "key" if "key" in self.shapes else "image_path",
        }
        self.usual = {name: place for name, place in usual.items() if place in self.shapes}


def _check(path: Path, metadata: ParquetArrays, vectors: dict[str, list[NpyArray]]) -> None:
    """Compare the rows of files that belong together."""
    if not vectors:
        raise EXPECTED.refusal(path, "there is neither img_emb nor text_emb")
    expected = metadata.file_rows
    parts = [_part(file) for file in metadata.files]
    for name, arrays in vectors.items():
        theirs = [_part(array.place) for array in arrays]
        if theirs != parts:
            apart = sorted({*theirs} ^ {*parts})
            why = (
                f"{name} has {len(arrays)} files, metadata {len(expected)}; the parts {apart[:5]} "
                f"are in one of them only"
            )
            raise EXPECTED.refusal(path, why)
        for array in arrays:
            if array.shape[1:] != arrays[0].shape[1:]:
                why = f"it has shape {array.shape}, {arrays[0].place.name} {arrays[0].shape}"
                raise EXPECTED.refusal(array.place, why)
        first = 0
        for array, file, rows in zip(arrays, metadata.files, expected, strict=True):
            if array.shape[0] != rows or len(array.shape) != 2:
                row = first + min(array.shape[0], rows)
                why = f"it has shape {array.shape} and {file.name} {rows} rows, from row {row} on"
                raise EXPECTED.refusal(array.place, why)
            first += rows


def _part(file: Path) -> str:
    """Return the number of a file among those of its folder, without the zeros before it."""
    number = file.stem.rpartition("_")[2]
    return str(int(number)) if number.isdecimal() else number


def _tell_what_is_missing(path: Path, metadata: ParquetArrays, vectors: Collection[str]) -> None:
    """Warn of numbers that no file has: the rows of a part that failed are not there."""
    numbers = {int(part) for part in map(_part, metadata.files) if part.isdecimal()}
    if missing := sorted(set(range(max(numbers, default=0))) - numbers):
        logger.warning(
            "%s: a gap in the numbers of its parts: %s missing (of %d); their rows are not there",
            path,
            ", ".join(map(str, missing[:MISSING_SHOWN])),
            max(numbers) + 1,
        )
    for name in ("img_emb", "text_emb"):
        if name not in vectors:
            logger.warning("%s: there is nothing in %s; the rest is imported", path, name)


class _ClipRetrievalPart(ExitStack):
    def __init__(self, layout: Layout, digits: int, folder: Path, number: int, rows: range) -> None:
        super().__init__()
        self._names = _names(layout)
        plain = [name for name in self._names if not name.endswith("/features")]
        fields = [(self._names[name], _type(name)) for name in plain]
        schema = pa.schema(fields, metadata={LAYOUT_KEY: layout.to_json()})
        places = {f"{column}/features": dim for column, dim in layout.columns.items()}
        self.files: list[Path] = []
        self._vectors = dict[str, IO[bytes]]()
        for array, dim in places.items():
            name = self._names[array]
            parent = folder if name in ("img_emb", "text_emb") else folder / "columns"
            file = self.enter_context(self._file(parent / name, number, digits, "npy").open("wb"))
            write_header(file, "<f2", (len(rows), dim))
            self._vectors[array] = file
        metadata = self._file(folder / "metadata", number, digits, "parquet")
        self._metadata = self.enter_context(pq.ParquetWriter(metadata, schema))

    def _file(self, folder: Path, number: int, digits: int, suffix: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        self.files.append(folder / f"{folder.name}_{number:0{digits}d}.{suffix}")
        return self.files[-1]

    def write(self, block: Block) -> None:
        for name, file in self._vectors.items():
            file.write(np.ascontiguousarray(block[name].astype("<f2", copy=False)).data)
        plain = {
            theirs: block[name] for name, theirs in self._names.items() if name not in self._vectors
        }
        self._metadata.write_batch(as_batch(plain, self._metadata.schema))


def _pieces(arrays: list[NpyArray]) -> Iterator[np.ndarray]:
    for array in arrays:
        for start in range(0, array.shape[0], 4096):
            yield array.read(start, min(start + 4096, array.shape[0]))


def _names(layout: Layout) -> dict[str, str]:
    """Return what each array of a store is called there."""
    names = {name: name for name in layout.array_names} | {"key": "image_path"}
    if captions := [name for name in layout.names if name.startswith("caption/")]:
        names[captions[0]] = "caption"
    for kind, theirs in [("image/", "img_emb"), ("text/", "text_emb")]:
        columns = [name for name in layout.columns if name.startswith(kind)]
        for place, column in enumerate(columns):
            further = column.replace("/", ".")
            names[f"{column}/features"] = further if place else theirs
    return names


def _type(name: str) -> pa.DataType:
    if name.endswith("/status"):
        return pa.uint8()
    return pa.int32() if name in NUMBERS else pa.string()


read = ClipRetrievalArrays
