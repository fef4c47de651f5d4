"""Parquet files that hold the encoded images themselves."""

import json
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from features.config import DataPattern
from features.errors import SourceError
from features.sources.base import (
    Counts,
    ImageReader,
    Known,
    Sample,
    SourceReader,
    SourceSettings,
    matching_files,
)
from features.storage.files import BUFFER_BYTES, open_file
from features.storage.place import Place, RemotePath, as_place

ROWS_AT_ONCE = 4096
IMAGES_AT_ONCE = 64
BATCHES_KEPT = 16
"""So that 32 workers of 32 rows each find theirs, whichever of them comes first."""


class ParquetSource(SourceSettings):
    """Parquet files that hold the encoded image bytes themselves."""

    kind: Literal["parquet"]
    path: DataPattern | tuple[DataPattern, ...]
    """Glob pattern(s) of the parquet files, `{00000..00010}` too; each read in sorted order."""
    image: str = "image"
    """Column with the image bytes, plain or as `{bytes, path}` (Hugging Face datasets)."""
    key: str | None = None
    """Column with a unique name of the row; its number in the file if not given, or null."""

    def _open(self, known: Known) -> "ImageParquet":
        return ImageParquet(self, matching_files(self.path), known)

    def image_reader(self) -> "ParquetImages":
        """Return what reads the column of images."""
        return ParquetImages(self.image)


class ImageParquet(SourceReader[ParquetSource]):
    """Lists the rows of parquet files by the columns of use; the images are not read."""

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield one sample per row of a file.

        Raises:
            SourceError: It is no whole parquet file, or lacks a column.
        """
        with _whole(file) as parquet:
            self._check_columns(file, parquet.schema_arrow)
            yield from self._samples(file, parquet, counts)

    def num_samples(self, file: Place) -> int:
        """Return the rows of a file, by its footer alone."""
        with _whole(file) as parquet:
            return int(parquet.metadata.num_rows)

    def own_class_names(self) -> tuple[tuple[str, ...], Place] | None:
        """Return the names that Hugging Face datasets write with a column of class labels."""
        file = next(iter(self.files))
        with _whole(file) as parquet:
            text = (parquet.schema_arrow.metadata or {}).get(b"huggingface")
        try:
            names = json.loads(text or b"{}")["info"]["features"][self.source.label]["names"]
        except (ValueError, KeyError, TypeError):
            return None
        return tuple(map(str, names)), file

    def _check_columns(self, file: Place, schema: pa.Schema) -> None:
        source = self.source
        for setting, name in [("image", source.image), ("key", source.key)]:
            if name is not None and name not in schema.names:
                raise SourceError(
                    f"{file} has no column {name!r}; it has {schema.names[:20]}. Correct "
                    f"`{setting}` of the source."
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
        source = self.source
        keys = self.keys(file, counts)
        names = [name for name in parquet.schema_arrow.names if name != source.image]
        self.picker.see(names)
        of_use = {*self.picker.names, source.key, source.label, source.group}
        light = [name for name in names if name in of_use]
        number = 0
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=light):
            for row in batch.to_pylist() if light else [{}] * batch.num_rows:
                own = row[source.key] if source.key else None
                key, problem = keys.of(f"{number:09d}" if own is None else str(own))
                sample = Sample(key, str(file), offset=number, problem=problem)
                self.describe(sample, row, counts)
                yield sample
                number += 1


@dataclass(frozen=True)
class _Batch:
    """Images that stand together in a file."""

    path: str
    first: int
    images: pa.Array

    @property
    def stop(self) -> int:
        return self.first + len(self.images)


class ParquetImages(ImageReader):
    """Reads images out of parquet files by number, a few at once; the last ones are kept.

    A file is read on from where it was left, so rows in order are read once, whatever the size of
    its row groups.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._lock = threading.Lock()
        self._starts: dict[str, list[int]] = {}
        self._kept: deque[_Batch] = deque(maxlen=BATCHES_KEPT)
        self._coming: Iterator[_Batch] = iter(())
        self._position = ("", 0)
        """The file, and its row, that come next."""

    def read(self, path: str, places: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Return the images of some rows of a file; None where the row has none.

        Raises:
            SourceError: The file has gone, changed, or lost rows since it was indexed.
        """
        try:
            with self._lock:
                return [self._image(path, row) for row, _ in places]
        except (pa.ArrowException, OSError, IndexError, KeyError) as error:
            raise SourceError(
                f"{path} cannot be read as it was indexed: {error}. Restore it, or delete the "
                f"index and the store to start again."
            ) from error

    def _image(self, path: str, row: int) -> bytes | None:
        kept = (each for each in self._kept if each.path == path and each.first <= row < each.stop)
        batch = next(kept, None) or self._read_to(path, row)
        value = batch.images[row - batch.first].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        return value if isinstance(value, bytes) else None

    def _read_to(self, path: str, row: int) -> _Batch:
        """Read on to the batch that has a row, or from the beginning of its row group."""
        if path not in self._starts:
            self._starts[path] = _row_group_starts(path)
        starts = self._starts[path]
        if row >= starts[-1]:
            raise IndexError(f"it has {starts[-1]} rows, and row {row} is asked for")
        group = bisect_right(starts, row) - 1
        at, position = self._position
        if at != path or not starts[group] <= position <= row:
            self._coming = _batches(path, self._column, group, starts[group])
        for batch in self._coming:
            self._position = (path, batch.stop)
            self._kept.append(batch)
            if row < batch.stop:
                return batch
        raise IndexError(f"it ends before row {row}")


def _batches(path: str, column: str, group: int, first: int) -> Iterator[_Batch]:
    """Yield the images of a file from a row group on, of which `first` is the first row.

    Arrow would take the column to memory whole, all row groups of it, if it were to read ahead.
    """
    place = as_place(path)
    source = open_file(place) if isinstance(place, RemotePath) else place
    with pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        groups = list(range(group, file.num_row_groups))
        for batch in file.iter_batches(IMAGES_AT_ONCE, row_groups=groups, columns=[column]):
            yield _Batch(path, first, batch.column(0))
            first += batch.num_rows


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
            f"{file} cannot be read as parquet: {str(error).rstrip('.')}. Fetch it again, or take "
            f"it out of `path`."
        ) from error


def _row_group_starts(path: str) -> list[int]:
    """Return the number of the first row of each row group, and the number of rows at the end."""
    with open_parquet(as_place(path)) as file:
        about = file.metadata
        rows = (about.row_group(number).num_rows for number in range(about.num_row_groups))
        return list(accumulate(rows, initial=0))
