"""Parquet files that hold the encoded images themselves."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.config import ParquetSource
from features.errors import SourceError
from features.sources.sample import (
    CaptionPicker,
    Counts,
    Keys,
    Sample,
    matching_files,
    named_files,
    read_class_names,
    whole_number,
)
from features.storage.files import open_file
from features.storage.place import Place, RemotePath, as_place

ROWS_AT_ONCE = 4096
ROW_GROUPS_KEPT = 2


class ImageParquet:
    """Parquet files with a column of encoded images, plain or as Hugging Face datasets save them.

    Only the other columns are read here; an image is found again by its file and number.
    """

    def __init__(self, source: ParquetSource, known: Mapping[Place, str]) -> None:
        self.files = named_files(matching_files(source.path), known)
        self.picker = CaptionPicker(source.captions, str(source.path))
        self._source = source

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the labels, where the recipe gives them."""
        return read_class_names(self._source.class_names)

    def check(self) -> None:
        """Refuse a name of captions that no row had."""
        self.picker.check()

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield one sample per row of a file.

        Raises:
            SourceError: It is no whole parquet file, or lacks a column.
        """
        with _whole(file) as parquet:
            self._check_columns(file, parquet.schema_arrow)
            yield from self._samples(file, parquet, counts)

    def num_rows(self, file: Place) -> int:
        """Return how many samples a file has, by its footer alone.

        Raises:
            SourceError: It is no whole parquet file.
        """
        with _whole(file) as parquet:
            return int(parquet.metadata.num_rows)

    def _check_columns(self, file: Place, schema: pa.Schema) -> None:
        source = self._source
        for setting, name in [("image", source.image), ("key", source.key)]:
            if name is not None and name not in schema.names:
                raise SourceError(
                    f"{file} has no column {name!r}; it has {schema.names[:20]}. The `{setting}` "
                    f"of the source was expected there. Correct it."
                )
        kind = schema.field(source.image).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise SourceError(
                f"The column {source.image!r} of {file} holds {kind}. Encoded images, as bytes or "
                f"as {{bytes, path}}, were expected. Correct `image` of the source."
            )

    def _samples(self, file: Place, parquet: pq.ParquetFile, counts: Counts) -> Iterator[Sample]:
        source = self._source
        keys = Keys(self.files[file], counts)
        light = [name for name in parquet.schema_arrow.names if name != source.image]
        number = 0
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=light):
            for row in batch.to_pylist() if light else [{}] * batch.num_rows:
                name = str(row[source.key]) if source.key else f"{number:09d}"
                key, problem = keys.of(name)
                sample = Sample(key, str(file), offset=number, problem=problem)
                sample.captions = self.picker.pick(row)
                sample.label = whole_number(row.get(source.label or ""), counts)
                sample.group = whole_number(row.get(source.group or ""), counts)
                yield sample
                number += 1


class ParquetImages:
    """Reads images out of parquet files by number; the row groups used last are kept.

    Not safe for several threads at once: `SampleReader` holds a lock.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._starts: dict[str, list[int]] = {}
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def read(self, path: str, rows: Sequence[int]) -> list[bytes | None]:
        """Return the images of some rows of a file; None where the row has none.

        Raises:
            SourceError: The file has gone, changed, or lost rows since it was indexed.
        """
        try:
            return [self._image(path, row) for row in rows]
        except (pa.ArrowException, OSError, IndexError, KeyError) as error:
            raise SourceError(
                f"{path} cannot be read as it was indexed: {error}. The same file was expected. "
                f"Restore it, or delete the index and the store to start again."
            ) from error

    def _image(self, path: str, row: int) -> bytes | None:
        if path not in self._starts:
            self._starts[path] = _row_group_starts(path)
        starts = self._starts[path]
        if row >= starts[-1]:
            raise IndexError(f"it has {starts[-1]} rows, and row {row} is asked for")
        number = bisect_right(starts, row) - 1
        value = self._row_group(path, number)[row - starts[number]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        return value if isinstance(value, bytes) else None

    def _row_group(self, path: str, number: int) -> Any:
        place = (path, number)
        if place not in self._kept:
            while len(self._kept) >= ROW_GROUPS_KEPT:
                self._kept.popitem(last=False)
            with open_parquet(as_place(path)) as file:
                table = file.read_row_group(number, columns=[self._column])
            self._kept[place] = table.column(self._column)
        self._kept.move_to_end(place)
        return self._kept[place]


def open_parquet(place: Place) -> pq.ParquetFile:
    """Open a parquet file; of one under a URL, footer and column chunks are read by ranges."""
    if isinstance(place, RemotePath):
        return pq.ParquetFile(open_file(place), pre_buffer=True)
    return pq.ParquetFile(place)


@contextmanager
def _whole(file: Place) -> Iterator[pq.ParquetFile]:
    """Open a file of a source, and refuse it where it cannot be read."""
    try:
        with open_parquet(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{file} cannot be read as parquet: {error}. A whole parquet file was expected. "
            f"Fetch it again, or take it out of `path`."
        ) from error


def _row_group_starts(path: str) -> list[int]:
    """Return the number of the first row of each row group, and the number of rows at the end."""
    with open_parquet(as_place(path)) as file:
        about = file.metadata
        rows = (about.row_group(number).num_rows for number in range(about.num_row_groups))
        return list(accumulate(rows, initial=0))
