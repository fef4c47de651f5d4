"""Parquet with vectors: lists of one length, in one file or in the files of a folder.

What `sail convert` wrote has a column for every array of the store, under its name there.
Features are float32, which every reader knows: of float16 values they are exact, and packed they
take little more.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.storage.reading import check_regular, reading
from features.storage.rows import NUMBERS
from pipeline.interrupt import StopRequest
from pipeline.stores.arrays import Arrays, SequentialArray, of_form
from pipeline.stores.blocks import STRINGS, Block, Layout, Rows
from pipeline.stores.writer import write_parts

LAYOUT_KEY = b"sail"
EXPECTED = of_form("Parquet with vectors of one length")
ROWS_AT_ONCE = 4096
BUFFER_BYTES = 1 << 20
FILE_BYTES = 1 << 28
"""Of vectors, before they are packed: what a killed export has to do again at most."""


def write(rows: Rows, out: Path, stop: StopRequest, *, file_bytes: int = FILE_BYTES) -> Path:
    """Write rows as a folder of parquet files, which readers take for one table.

    A file has about `file_bytes` before it is packed: whole chunks, and at least one.
    """
    layout = rows.layout
    fields = [pa.field(name, _type(name, layout)) for name in layout.array_names]
    schema = pa.schema(fields, metadata={LAYOUT_KEY: layout.to_json()})
    row_bytes = sum(4 * dim for dim in layout.columns.values())
    per_file = file_bytes // row_bytes
    return write_parts(rows, out, "parquet", per_file, stop, partial(_ParquetPart, schema))


class _ParquetPart(nullcontext["_ParquetPart"]):
    def __init__(self, schema: pa.Schema, folder: Path, number: int, _rows: range) -> None:
        super().__init__(self)
        self.files = (folder / f"part-{number:05d}.parquet",)
        vectors = [field.name for field in schema if _is_vector(field.type)]
        self._schema = schema
        self._writer = pq.ParquetWriter(
            self.files[0],
            schema,
            compression="zstd",
            use_byte_stream_split=[f"{name}.list.element" for name in vectors],
            use_dictionary=[name for name in schema.names if name not in vectors],
        )

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, block: Block) -> None:
        self._writer.write_batch(as_batch(block, self._schema))


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


class ParquetArrays(Arrays):
    """The columns of a parquet file, or of the files of a folder in the order of their names."""

    expected = EXPECTED

    def _open(self, path: Path, stack: ExitStack) -> None:
        self.files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise EXPECTED.refusal(path, "there is no .parquet file")
        # Otherwise a column of a whole row group, often a million rows, is read at once.
        streamed = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
        self._opened = [
            stack.enter_context(pq.ParquetFile(check_regular(file), **streamed))
            for file in self.files
        ]
        schema = self._opened[0].schema_arrow
        for file, opened in zip(self.files, self._opened, strict=True):
            if not opened.schema_arrow.equals(schema):
                raise EXPECTED.refusal(file, f"its columns are not those of {self.files[0]}")
        metadata = (schema.metadata or {}).get(LAYOUT_KEY)
        self.layout = None if metadata is None else _layout(path, metadata)
        self.file_rows = [opened.metadata.num_rows for opened in self._opened]
        self.rows = sum(self.file_rows)
        for field in schema:
            stream = SequentialArray(partial(self._batches, field.name))
            self._add(field.name, self._shape(field), stream.read)

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
                raise EXPECTED.refusal(file, why)
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
    with reading(f"The layout in {path}", EXPECTED):
        return Layout.from_json(text)


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


read = ParquetArrays
