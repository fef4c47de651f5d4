"""Parquet and Arrow files that hold the encoded images themselves, or their paths."""

import base64
import json
import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from features.config import DataPattern, DataPlace
from features.errors import SourceError, UnreadableError
from features.sources.base import (
    NO_PLACE,
    OF_LATER,
    Counts,
    ImageReader,
    Known,
    Sample,
    SourceReader,
    SourceSettings,
    matching_files,
)
from features.sources.image_folder import FoundImage, ImageFolder, place_image
from features.status import Status
from features.storage.files import BUFFER_BYTES, open_file
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath, as_place
from features.storage.reading import check_regular

ROWS_AT_ONCE = 4096
BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How JPEG, PNG, GIF and WebP begin in it."""
IMAGES_AT_ONCE = 64
ARROW_MAGIC = b"ARROW1"
ARROW_FILES_KEPT = 64
BATCH_BYTES = 1 << 26
LONG_TEXT_BYTES = 1 << 14
"""Longer ones are not repeated often enough to be worth a dictionary."""
BATCHES_KEPT = 16
"""So that 32 workers of 32 rows each find theirs, whichever of them comes first."""


class ImageTableSettings(SourceSettings):
    """What all sources of tables with images have."""

    image: str = "image"
    """Column with the image bytes, plain, in base64, or as `{bytes, path}` (Hugging Face datasets).
    Where it holds other text, or `{bytes, path}` without any bytes, it names image files."""
    images: DataPlace | None = Field(default=None, json_schema_extra=OF_LATER)
    """Folder of the images, or its URL, where the column names files: relative to it, or absolute
    and inside of it. The folder of the parquet file if not given."""
    key: str | None = None
    """Column with a unique name of the row; its number in the file if not given, or null."""

    def image_reader(self) -> "ParquetImages":
        """Return what reads the column of images."""
        return ParquetImages(self.image)


class ParquetSource(ImageTableSettings):
    """Parquet or Arrow files that hold the encoded image bytes themselves, or paths of images."""

    kind: Literal["parquet"]
    path: DataPattern | tuple[DataPattern, ...]
    """Glob pattern(s) of the parquet files, `{00000..00010}` too; each read in sorted order. Or of
    the `.arrow` files that `save_to_disk` of Hugging Face datasets writes (`data-*.arrow`)."""

    def _open(self, known: Known) -> "ImageParquet":
        return ImageParquet(self, matching_files(self.path), known)


class ImageParquet(SourceReader[ImageTableSettings]):
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
        with _whole(file) as table:
            about: Any = table if isinstance(table, ArrowFile) else table.metadata  # type: ignore[attr-defined]
            return int(about.num_rows)

    def own_class_names(self) -> tuple[tuple[str, ...], Place] | None:
        """Return the names that Hugging Face datasets write with a column of class labels."""
        for file in self.files:
            try:
                with _whole(file) as parquet:
                    text = (parquet.schema_arrow.metadata or {}).get(b"huggingface")
                break
            except UnreadableError:  # told when its rows are listed
                continue
        else:
            return None
        try:
            names = json.loads(text or b"{}")["info"]["features"][self.source.label]["names"]
        except (ValueError, KeyError, TypeError):
            return None
        return tuple(map(str, names)), file

    def _check_columns(self, file: Place, schema: pa.Schema) -> None:
        source = self.source
        for setting, name in [("image", source.image), ("key", source.key)]:
            if name is not None and name not in schema.names:
                held = [each.name for each in schema if _holds_bytes(each.type)]
                hint = f" {held[0]!r} holds bytes." if setting == "image" and held else ""
                raise SourceError(
                    f"{file} has no column {name!r}; it has {schema.names[:20]}.{hint} Correct "
                    f"`{setting}` of the source."
                )
        of_use = {source.image, source.key, source.label, source.group, *self.picker.names}
        check_names_differ(file, [name for name in schema.names if name in of_use])
        kind = schema.field(source.image).type
        if not (_holds_bytes(kind) or _holds_paths(kind)):
            raise SourceError(
                f"The column {source.image!r} of {file} holds {kind}. Encoded images, as bytes or "
                f"as {{bytes, path}}, or paths of image files were expected. Correct `image` of "
                f"the source."
            )

    def _samples(self, file: Place, parquet: "ImageTable", counts: Counts) -> Iterator[Sample]:
        source = self.source
        keys = self.keys(file, counts)
        names = [name for name in parquet.schema_arrow.names if name != source.image]
        self.picker.see(names)
        of_use = {*self.picker.names, source.key, source.label, source.group}
        light = [name for name in names if name in of_use]
        paths = _path_column(parquet, source.image)
        columns = light if paths is None else [*light, paths]
        images = ImageFolder(source.images or file.parent, file)

        def find(row: dict[str, Any]) -> tuple[dict[str, Any], FoundImage | None]:
            name = row.pop(source.image, None)
            name = name.get("path") if isinstance(name, dict) else name
            return row, images.find(name) if paths is not None and name else None

        rows = (
            row
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns)
            for row in (batch.to_pylist() if columns else [{}] * batch.num_rows)
        )
        found_rows = in_order(find, rows, at=source.images or file) if paths else map(find, rows)
        for number, (row, found) in enumerate(found_rows):
            own = row[source.key] if source.key else None
            key, problem = keys.of(f"{number:09d}" if own is None else str(own))
            sample = Sample(key, str(file), offset=number, problem=problem)
            self.describe(sample, row, counts)
            if found is not None:
                sample.offset = NO_PLACE
                place_image(sample, found, images, self, counts)
            elif paths is not None:
                sample.offset, sample.problem = NO_PLACE, int(Status.MISSING_IMAGE)
            yield sample


def image_columns(file: Place) -> dict[str, bool]:
    """Return the columns of a file that may hold images, and whether as bytes; else as paths.

    Raises:
        SourceError: It is no whole parquet or Arrow file.
    """
    with _whole(file) as table:
        columns = {each.name: each.type for each in table.schema_arrow}
    is_of_bytes = {name: _holds_bytes(kind) for name, kind in columns.items()}
    return {
        name: of_bytes
        for name, of_bytes in is_of_bytes.items()
        if of_bytes or _holds_paths(columns[name])
    }


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a column holds encoded images, as any writer may say so."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*tests, pa.types.is_fixed_size_binary))


def _holds_paths(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        kind = kind.field("path").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _path_column(table: "ImageTable", column: str) -> str | None:
    """Return the column of the paths of images, None where the images themselves are there."""
    kind = table.schema_arrow.field(column).type
    if not _holds_paths(kind) or _holds_base64(table, column):
        return None
    if not pa.types.is_struct(kind):
        return column
    has_bytes = _holds_bytes(kind) and not has_nulls_only(table, f"{column}.bytes")
    return None if has_bytes else f"{column}.path"


def _holds_base64(table: "ImageTable", column: str) -> bool:
    """Return whether a column of text holds encoded images, as its first value says."""
    for batch in table.iter_batches(1, columns=[column]):
        for value in batch.column(0).to_pylist():
            if value is not None:
                return isinstance(value, str) and value.startswith(BASE64)
    return False


def check_names_differ(file: Place, names: Sequence[str]) -> None:
    """Refuse columns of one name: one of them would be lost.

    Raises:
        SourceError: Naming it.
    """
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise SourceError(
            f"{file} has {names.count(twice[0])} columns called {twice[0]!r}, of which one would "
            f"be lost. A name of its own for each was expected. Rename one of them, and write the "
            f"file anew."
        )


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
        self._arrow = lru_cache(ARROW_FILES_KEPT)(self._open_arrow)
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
        if places[0][1] >= 0:  # an image file that the column names
            return list(super().read(path, places))
        try:
            with self._lock:
                return [self._image(path, row) for row, _ in places]
        except (pa.ArrowException, OSError, IndexError, KeyError) as error:
            raise SourceError(
                f"{path} cannot be read as it was indexed: {error}. Restore it, or delete the "
                f"index and the store to start again."
            ) from error

    def _open_arrow(self, path: str) -> pa.ChunkedArray:
        return ArrowFile(as_place(path)).column(self._column)

    def _image(self, path: str, row: int) -> bytes | None:
        if is_arrow(path):
            value = self._arrow(path)[row].as_py()
        else:
            of_file = (each for each in self._kept if each.path == path)
            kept = (each for each in of_file if each.first <= row < each.stop)
            batch = next(kept, None) or self._read_to(path, row)
            value = batch.images[row - batch.first].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if isinstance(value, str):
            try:
                value = base64.b64decode(value, validate=True)
            except ValueError:
                value = b"no base64"
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


@runtime_checkable
class ImageTable(Protocol):
    """What `pyarrow.parquet.ParquetFile` and `ArrowFile` have of use here."""

    schema_arrow: pa.Schema

    def iter_batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns, so many rows at once."""


class _Bounded(pq.ParquetFile):  # type: ignore[misc]
    """Reads fewer rows at once where they are long: a caption of 200 MB packs into kilobytes."""

    def iter_batches(
        self, batch_size: int, row_groups: Sequence[int] | None = None, columns: Any = None
    ) -> Iterator[pa.RecordBatch]:
        groups = range(self.num_row_groups) if row_groups is None else row_groups
        longest = max((self._row_bytes(group, columns) for group in groups), default=1)
        rows = max(1, min(batch_size, BATCH_BYTES // longest))
        batches: Iterator[pa.RecordBatch] = super().iter_batches(rows, list(groups), columns)
        return batches

    def _row_bytes(self, group: int, columns: Sequence[str] | None) -> int:
        """Return about how long a row of a group is; any could be as long as the dictionary."""
        about, longest = self.metadata.row_group(group), 1
        for number in range(about.num_columns):
            column = about.column(number)
            path = f"{column.path_in_schema}."  # of a list or struct more than the column's name
            if columns is None or any(path.startswith(f"{name}.") for name in columns):
                mean = column.total_uncompressed_size // max(1, about.num_rows)
                is_odd = column.has_dictionary_page and mean > LONG_TEXT_BYTES
                longest += column.total_uncompressed_size if is_odd else mean
        return longest


def open_parquet(place: Place) -> pq.ParquetFile:
    """Open a parquet file; of one under a URL, footer and column chunks are read by ranges."""
    if isinstance(place, RemotePath):
        return _Bounded(open_file(place), pre_buffer=True)
    return _Bounded(check_regular(place))


def is_arrow(place: Place | str) -> bool:
    """Return whether a file is one of Arrow's own, by its name."""
    return str(place).lower().endswith((".arrow", ".feather"))


class ArrowFile:
    """A file of Arrow's own (a stream, as Hugging Face datasets write it, or a file), mapped."""

    def __init__(self, place: Place) -> None:
        if isinstance(place, RemotePath):
            raise SourceError(
                f"{place} is an Arrow file under a URL, of which no image could be read alone. A "
                f"local copy was expected. Fetch it, or write it as parquet."
            )
        content = pa.memory_map(str(place))
        if content.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
            self._table = pa.ipc.open_file(content).read_all()
        else:
            content.seek(0)
            self._table = pa.ipc.open_stream(content).read_all()
        self.schema_arrow: pa.Schema = self._table.schema
        self.num_rows: int = self._table.num_rows

    def __enter__(self) -> "ArrowFile":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column; nothing is read until its values are."""
        return self._table.column(name)

    def iter_batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns, so many rows at once; `a.b` stands for all of `a`."""
        there = set(self._table.column_names)
        names = [name if name in there else name.rpartition(".")[0] for name in columns]
        return iter(self._table.select(names or [self._table.column_names[0]]).to_batches(rows))


def has_nulls_only(table: ImageTable, column: str) -> bool:
    """Return whether a column `a.b` is null in every row, as far as that is known unread."""
    if isinstance(table, ArrowFile):
        parent, _, field = column.rpartition(".")
        values = pc.struct_field(table.column(parent), field)
        return bool(values.null_count == len(values))
    about: Any = table.metadata  # type: ignore[attr-defined]
    for group in map(about.row_group, range(about.num_row_groups)):
        parts = (group.column(number) for number in range(group.num_columns))
        found = next((part for part in parts if part.path_in_schema == column), None)
        counted = found.statistics if found is not None else None
        if counted is None or not counted.has_null_count or counted.num_values:
            return False
    return True


@contextmanager
def _whole(file: Place) -> Iterator[ImageTable]:
    """Open a file of a source, and refuse it where it cannot be read."""
    try:
        with ArrowFile(file) if is_arrow(file) else open_parquet(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        form = "Arrow" if is_arrow(file) else "parquet"
        raise UnreadableError(
            f"{file} cannot be read as {form}: {str(error).rstrip('.')}. Fetch it again, or take "
            f"it out of `path`."
        ) from error


def _row_group_starts(path: str) -> list[int]:
    """Return the number of the first row of each row group, and the number of rows at the end."""
    with open_parquet(as_place(path)) as file:
        about = file.metadata
        rows = (about.row_group(number).num_rows for number in range(about.num_row_groups))
        return list(accumulate(rows, initial=0))
