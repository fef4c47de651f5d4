"""The folder that `clip-retrieval inference` writes: `img_emb`, `text_emb`, `metadata`.

`img_emb/img_emb_0.npy`, `text_emb/text_emb_0.npy` and `metadata/metadata_0.parquet` hold the same
rows, a million of them each. Of a store, the first image column and the first text column go there,
further columns to `columns/<name>`, and everything else into the metadata.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy

from features.store import NUMBERS
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.stores.arrays import NpyArray, Stream, opener, unreadable
from pipeline.stores.blocks import Block, Layout, Rows, chunks_of
from pipeline.stores.parquet import LAYOUT_KEY, ParquetArrays, as_batch
from pipeline.stores.resumable import check_free, unfinished

ROWS_PER_FILE = 1_000_000
EXPECTED = "A folder as `clip-retrieval inference` writes it"


def write_clip_retrieval(
    rows: Rows, out: Path, stop: StopRequest, *, rows_per_file: int = ROWS_PER_FILE
) -> Path:
    """Write rows as such a folder: it appears when all of it is there, and goes on where stopped.

    Args:
        rows: Of a store.
        out: The folder; there must be none.
        stop: Asked before every chunk.
        rows_per_file: How many rows a file has; rounded down to whole chunks.

    Raises:
        StoreError: There is something at `out`, or another process is at it.
        Stopped: A signal came.
    """
    check_free(out)
    layout, size = rows.layout, rows.layout.rows_per_chunk
    chunks = range(-(-layout.rows // size))
    per_file = max(1, rows_per_file // size)
    files = chunks[::per_file]
    with (
        unfinished(out, "clip-retrieval", per_file, layout.to_json(), rows.stamp) as work,
        ProgressLine(out.name, None, "chunks") as line,
    ):
        work.made.mkdir(exist_ok=True)
        line.set(work.done * per_file, len(chunks))
        for first in files[work.done :]:
            name = str(first // per_file).zfill(len(str(len(files) - 1)))
            count = min(per_file * size, layout.rows - first * size)
            with _Part(work.made, name, count, layout) as part:
                for block in chunks_of(rows, size, stop, chunks[first : first + per_file]):
                    part.write(block)
                    line.advance(1)
            work.advance(*part.files)
        work.made.rename(out)
    return out


class ClipRetrievalArrays(AbstractContextManager["ClipRetrievalArrays"]):
    """Its embeddings, `img_emb` and `text_emb`, and the columns of its metadata by their names."""

    def __init__(self, path: Path) -> None:
        """Read the headers of all files.

        Raises:
            SourceError: It is no such folder, or files of the same rows have different numbers of
                rows.
        """
        with ExitStack() as stack:
            self._metadata = stack.enter_context(ParquetArrays(path / "metadata"))
            folders = [path / "img_emb", path / "text_emb", *sorted((path / "columns").glob("*"))]
            self._vectors = {
                folder.name: [
                    stack.enter_context(NpyArray(file, opener(file)))
                    for file in sorted(folder.glob("*.npy"))
                ]
                for folder in folders
                if folder.is_dir()
            }
            self._check(path)
            self._stack = stack.pop_all()
        self.layout = self._metadata.layout
        self._names = _names(self.layout) if self.layout else {}
        theirs = dict(self._metadata.shapes)
        for name, arrays in self._vectors.items():
            theirs[name] = (self._metadata.rows, arrays[0].shape[1])
        ours = {name: theirs[their] for name, their in self._names.items() if their in theirs}
        self.shapes: Mapping[str, tuple[int, ...]] = ours or theirs
        self.files = tuple(
            file for each in (path / "metadata", *folders) for file in sorted(each.glob("*.*"))
        )
        self._streams = {
            name: Stream(lambda arrays=arrays: _parts(arrays))  # type: ignore[misc]
            for name, arrays in self._vectors.items()
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def usual(self) -> Mapping[str, str]:
        """Both embeddings as those of an encoder `clip`, the captions, and img2dataset's keys."""
        usual = {
            "image/clip": "img_emb",
            "text/clip/caption": "text_emb",
            "caption/caption": "caption",
            "key": "key" if "key" in self.shapes else "image_path",
        }
        return {name: place for name, place in usual.items() if place in self.shapes}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of an array."""
        name = self._names.get(name, name)
        if name in self._streams:
            return self._streams[name].read(start, stop)
        return self._metadata.read(name, start, stop)

    def _check(self, path: Path) -> None:
        """Compare the rows of files that belong together."""
        if not self._vectors:
            raise unreadable(path, "there is neither img_emb nor text_emb", EXPECTED)
        expected = self._metadata.file_rows
        for name, arrays in self._vectors.items():
            if len(arrays) != len(expected):
                why = f"{name} has {len(arrays)} files, metadata {len(expected)}"
                raise unreadable(path, why, EXPECTED)
            first = 0
            for array, file, rows in zip(arrays, self._metadata.files, expected, strict=True):
                if array.shape[0] != rows or len(array.shape) != 2:
                    row = first + min(array.shape[0], rows)
                    why = (
                        f"it has shape {array.shape} and {file.name} {rows} rows, from row {row} on"
                    )
                    raise unreadable(array.place, why, EXPECTED)
                first += rows


class _Part(AbstractContextManager["_Part"]):
    """The files of some rows, as they are written."""

    def __init__(self, folder: Path, number: str, rows: int, layout: Layout) -> None:
        self._names = _names(layout)
        plain = [name for name in self._names if not name.endswith("/features")]
        fields = [(self._names[name], _type(name)) for name in plain]
        schema = pa.schema(fields, metadata={LAYOUT_KEY: layout.to_json()})
        self.files: list[Path] = []
        with ExitStack() as stack:
            self._vectors = dict[str, IO[bytes]]()
            for column, dim in layout.columns.items():
                name = self._names[f"{column}/features"]
                parent = folder if name in ("img_emb", "text_emb") else folder / "columns"
                (parent / name).mkdir(parents=True, exist_ok=True)
                self.files.append(parent / name / f"{name}_{number}.npy")
                file = stack.enter_context(self.files[-1].open("wb"))
                header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
                npy.write_array_header_1_0(file, header)
                self._vectors[f"{column}/features"] = file
            (folder / "metadata").mkdir(exist_ok=True)
            self.files.append(folder / "metadata" / f"metadata_{number}.parquet")
            self._metadata = stack.enter_context(pq.ParquetWriter(self.files[-1], schema))
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, block: Block) -> None:
        """Write the next rows."""
        for name, file in self._vectors.items():
            file.write(np.ascontiguousarray(block[name].astype("<f2", copy=False)).data)
        plain = {
            theirs: block[name] for name, theirs in self._names.items() if name not in self._vectors
        }
        self._metadata.write_batch(as_batch(plain, self._metadata.schema))


def _parts(arrays: list[NpyArray]) -> Iterator[np.ndarray]:
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
