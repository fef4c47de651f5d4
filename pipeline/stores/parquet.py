"""Parquet with vectors: lists of one length, in one file or in the files of a folder.

What `sail convert` wrote has a column for every array of the store, under its name there.
Features are float32, which every reader knows: of float16 values they are exact, and packed they
take little more.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import SourceError
from features.sources.tables import table_rows
from features.store import NUMBERS
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.stores.arrays import Arrays, Stream, unreadable
from pipeline.stores.blocks import STRINGS, Block, Layout, Rows, chunks_of
from pipeline.stores.resumable import check_free, unfinished

LAYOUT_KEY = b"sail"
EXPECTED = "Parquet with vectors of one length"
ROWS_AT_ONCE = 4096
BUFFER_BYTES = 1 << 20
FILE_BYTES = 1 << 28
"""Of vectors, before they are packed: what a killed export has to do again at most."""


def write_parquet(
    rows: Rows, out: Path, stop: StopRequest, *, file_bytes: int = FILE_BYTES
) -> Path:
    """Write rows as a folder of parquet files, which readers take for one table.

    It appears when all of it is there, and goes on where it was stopped.

    Args:
        rows: Of a store.
        out: The folder; there must be none.
        stop: Asked before every chunk.
        file_bytes: How much a file holds, before it is packed; of whole chunks, and at least one.

    Raises:
        StoreError: There is something at `out`, or another process is at it.
        Stopped: A signal came.
    """
    check_free(out)
    layout, size = rows.layout, rows.layout.rows_per_chunk
    fields = [pa.field(name, _type(name, layout)) for name in layout.array_names]
    schema = pa.schema(fields, metadata={LAYOUT_KEY: layout.to_json()})
    chunks = range(-(-layout.rows // size))
    row_bytes = sum(4 * dim for dim in layout.columns.values())
    per_file = max(1, file_bytes // (size * row_bytes))
    with (
        unfinished(out, "parquet", per_file, layout.to_json(), rows.stamp) as work,
        ProgressLine(out.name, None, "chunks") as line,
    ):
        work.made.mkdir(exist_ok=True)
        line.set(work.done * per_file, len(chunks))
        for first in chunks[::per_file][work.done :]:
            file = work.made / f"part-{first // per_file:05d}.parquet"
            with _writer(file, schema) as writer:
                for block in chunks_of(rows, size, stop, chunks[first : first + per_file]):
                    writer.write_batch(as_batch(block, schema))
                    line.advance(1)
            work.advance(file)
        work.made.rename(out)
    return out


def _writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    vectors = [field.name for field in schema if _is_vector(field.type)]
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        use_byte_stream_split=[f"{name}.list.element" for name in vectors],
        use_dictionary=[name for name in schema.names if name not in vectors],
    )


def as_batch(block: Block, schema: pa.Schema) -> pa.RecordBatch:
    """Return a block as rows of a table; vectors become lists of one length."""
    arrays = []
    for field in schema:
        values = block[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(values.astype(np.float32).ravel())
            values = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
        elif values.dtype == STRINGS:
            values = pa.array(values.tolist(), pa.string())
        arrays.append(values)
    return pa.record_batch(arrays, schema=schema)


class ParquetArrays(AbstractContextManager["ParquetArrays"]):
    """The columns of a parquet file, or of the files of a folder in the order of their names."""

    usual: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        """Read the metadata.

        Raises:
            SourceError: There is no such file, one is damaged, or one has other columns.
        """
        self.files = tuple(sorted(path.rglob("*.parquet"))) if path.is_dir() else (path,)
        if not self.files:
            raise unreadable(path, "there is no .parquet file", EXPECTED)
        try:
            # Otherwise a column of a whole row group, often a million rows, is read at once.
            streamed = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
            self._opened = [pq.ParquetFile(file, **streamed) for file in self.files]
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error, EXPECTED) from error
        self.schema = self._opened[0].schema_arrow
        for file, opened in zip(self.files, self._opened, strict=True):
            if not opened.schema_arrow.equals(self.schema):
                raise unreadable(file, f"its columns are not those of {self.files[0]}", EXPECTED)
        metadata = (self.schema.metadata or {}).get(LAYOUT_KEY)
        self.layout = None if metadata is None else _layout(path, metadata)
        self.file_rows = [opened.metadata.num_rows for opened in self._opened]
        self.rows = sum(self.file_rows)
        self.shapes = {field.name: self._shape(field) for field in self.schema}
        self._streams = dict[str, Stream]()

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for opened in self._opened:
            opened.close()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of a column.

        Raises:
            SourceError: A vector of theirs has another length than the first.
        """
        if name not in self._streams:
            self._streams[name] = Stream(lambda: self._batches(name))
        return self._streams[name].read(start, stop)

    def _batches(self, name: str) -> Iterator[np.ndarray]:
        first = 0
        for file, opened in zip(self.files, self._opened, strict=True):
            for batch in opened.iter_batches(ROWS_AT_ONCE, columns=[name]):
                yield self._values(file, name, batch.column(0), first)
                first += batch.num_rows

    def _values(self, file: Path, name: str, column: pa.Array, first: int) -> np.ndarray:
        """Return a batch of a column: texts, numbers, or vectors (zero where there is none)."""
        if _is_vector(column.type):
            dim = self.shapes[name][1]
            other = pc.fill_null(pc.not_equal(pc.list_value_length(column), dim), False)
            if wrong := pc.indices_nonzero(other).to_pylist():
                length = len(column[wrong[0]])
                why = f"{name} of row {first + wrong[0]} has {length} values, not {dim}"
                raise unreadable(file, why, EXPECTED)
            values = column.flatten().to_numpy(zero_copy_only=False)
            vectors = np.zeros((len(column), dim), dtype=values.dtype)
            vectors[column.is_valid().to_numpy(zero_copy_only=False)] = values.reshape(-1, dim)
            return vectors
        if pa.types.is_integer(column.type):
            filled = column if column.null_count == 0 else pc.fill_null(column, -1)
            return np.asarray(filled.to_numpy(zero_copy_only=False))
        texts = column.cast(pa.string()).fill_null("").to_pylist()
        return np.array(texts, dtype=STRINGS)

    def _shape(self, field: pa.Field) -> tuple[int, ...]:
        if not _is_vector(field.type):
            return (self.rows,)
        if pa.types.is_fixed_size_list(field.type):
            return (self.rows, field.type.list_size)
        for opened in self._opened:
            for batch in opened.iter_batches(1, columns=[field.name]):
                if batch.column(0).null_count == 0:
                    return (self.rows, len(batch.column(0)[0]))
        return (self.rows, 0)


def _layout(path: Path, text: bytes) -> Layout:
    try:
        return Layout.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise unreadable(
            path, f"its metadata {LAYOUT_KEY!r} are broken ({error})", EXPECTED
        ) from error


def _type(name: str, layout: Layout) -> pa.DataType:
    column, _, array = name.rpartition("/")
    if column in layout.columns:
        dim = layout.columns[column]
        return pa.list_(pa.float32(), dim) if array == "features" else pa.uint8()
    return pa.int32() if name in NUMBERS else pa.string()


def _is_vector(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    )


PREFIX = "table/"


class WithTable:
    """Arrays, and the columns of a `.csv`, `.tsv`, `.jsonl` or `.parquet` as `table/<column>`."""

    layout: Layout | None = None

    def __init__(self, arrays: Arrays, table: Path) -> None:
        """Count the rows of the table.

        Raises:
            SourceError: There is no such table, or it is empty.
        """
        if not table.is_file():
            raise SourceError(
                f"There is no table {table}. A .csv, .tsv, .jsonl or .parquet file was expected. "
                f"Correct --table."
            )
        self._arrays, self._table = arrays, table
        columns = list(next(iter(table_rows(table)), {}))
        rows = sum(1 for _ in table_rows(table))
        self._streams = {f"{PREFIX}{name}": self._stream(name) for name in columns}
        self.files: Sequence[Path] = (*arrays.files, table)
        self.usual = arrays.usual
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **arrays.shapes,
            **dict.fromkeys(self._streams, (rows,)),
        }

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of an array or of a column of the table, as texts."""
        if name in self._streams:
            return self._streams[name].read(start, stop)
        return self._arrays.read(name, start, stop)

    def _stream(self, column: str) -> Stream:
        def parts() -> Iterator[np.ndarray]:
            values = (row.get(column) for row in table_rows(self._table))
            texts = ("" if value is None else str(value) for value in values)
            while batch := list(itertools.islice(texts, ROWS_AT_ONCE)):
                yield np.array(batch, dtype=STRINGS)

        return Stream(parts)
