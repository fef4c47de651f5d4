"""Tables of captions that name image files beside them."""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from features.config import FolderSource
from features.errors import SourceError
from features.sources.parquet import open_parquet
from features.sources.sample import (
    CaptionPicker,
    Counts,
    Keys,
    Sample,
    read_class_names,
    split_image_suffix,
    whole_number,
)
from features.status import Status
from features.storage.files import is_file, open_file, remote_size
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath

ROWS_AT_ONCE = 4096
Rows = list[dict[str, Any]]


class CaptionTable:
    """A `.jsonl`, `.csv` or `.parquet` of captions that names image files in its folder.

    Rules: rows of the same image that follow each other are one sample, their captions the fields
    0, 1, and on (if that happens anywhere in the table); an image that comes again later is a
    duplicate, quarantined. Label and group are those of its first row. A file that is not there
    keeps a quarantined row. A path that leads out of the folder is refused, also by a link.
    """

    def __init__(self, source: FolderSource) -> None:
        if not is_file(source.path):
            raise SourceError(
                f"There is no table {source.path}. A .jsonl, .csv or .parquet file with a column "
                f"{source.image!r} was expected. Correct `path` of the source."
            )
        self.files = {source.path: source.path.stem}
        self.picker = CaptionPicker(source.captions, str(source.path))
        self._source = source

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the labels, where the recipe gives them."""
        return read_class_names(self._source.class_names)

    def check(self) -> None:
        """Refuse a name of captions that no row had."""
        self.picker.check()

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield one sample per image of the table.

        Raises:
            SourceError: The table cannot be read, or a row names no image, or one elsewhere.
        """
        keys = Keys(self.files[file], counts)
        several = self._has_rows_of_one_image(file)
        folder = file.parent.resolve() if isinstance(file, Path) else file.parent
        groups = itertools.groupby(table_rows(file), self._image_name)
        images = ((name, list(rows)) for name, rows in groups)

        def find(image: tuple[str, Rows]) -> tuple[str, Rows, str, int | None]:
            return *image, *find_image(folder, image[0], table=file)

        for name, rows, path, size in in_order(find, images, remote=not isinstance(file, Path)):
            captions = [self.picker.pick(row) for row in rows]
            key, problem = keys.of(*split_image_suffix(name))
            sample = Sample(key, problem=problem, captions=captions[0])
            if several:
                texts = [text for each in captions for text in each.values()]
                sample.captions = {str(i): text for i, text in enumerate(texts)}
            sample.label = whole_number(rows[0].get(self._source.label or ""), counts)
            sample.group = whole_number(rows[0].get(self._source.group or ""), counts)
            place_image(sample, path, size, counts)
            yield sample

    def _image_name(self, row: dict[str, Any]) -> str:
        name = row.get(self._source.image)
        if not isinstance(name, str) or not name or "\0" in name:
            raise SourceError(
                f"A row of {self._source.path} has {self._source.image} = {name!r}; its columns "
                f"are {list(row)[:20]}. The path of an image was expected. Set `image` of the "
                f"source to the column that names the images."
            )
        return name

    def _has_rows_of_one_image(self, file: Place) -> bool:
        names = (self._image_name(row) for row in table_rows(file))
        return any(a == b for a, b in itertools.pairwise(names))


def find_image(folder: Place, name: str, *, table: Place) -> tuple[str, int | None]:
    """Return the path of an image, and its size or None where there is no such file.

    Args:
        folder: What the name is relative to.
        name: From a table or an annotation file.
        table: That file, for the message.

    Raises:
        SourceError: The name leads out of the folder, also by a link.
    """
    if isinstance(folder, RemotePath):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise _outside(folder, name, table)
        place = folder / (quote(str(path)) if folder.has_escapes else str(path))
        return str(place), remote_size(place)
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder):
            raise _outside(folder, name, table)
        return str(file), file.stat().st_size if file.is_file() else None
    except (OSError, RuntimeError):  # a name too long, a folder not readable, a loop of links
        return str(file), None


def place_image(sample: Sample, path: str, size: int | None, counts: Counts) -> None:
    """Say where the image of a sample is; one that is not there is quarantined, and counted."""
    sample.path = path
    if size is not None:
        sample.offset, sample.size = 0, size
    else:
        counts["image files that are not there (quarantined)"] += 1
        sample.problem = sample.problem or int(Status.MISSING_IMAGE)


def _outside(folder: Place, name: str, table: Place) -> SourceError:
    return SourceError(
        f"{table} names the image {name!r}, which is not inside {folder}. Paths within that "
        f"folder were expected. Correct the table."
    )


def table_rows(file: Place) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dictionaries, without holding it in memory.

    Raises:
        SourceError: It is of no kind we read, or damaged.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise SourceError(
            f"The table {file} ends in {file.suffix!r}. One of {', '.join(readers)} was expected. "
            f"Convert it."
        )
    try:
        yield from readers[file.suffix](file)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise SourceError(
            f"The table {file} cannot be read: {error}. A whole {file.suffix} file in UTF-8 was "
            f"expected. Correct it, or fetch it again."
        ) from error


def _jsonl_rows(file: Place) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise SourceError(
                    f"Line {number} of {file} is not a JSON object. One object a line was "
                    f"expected. Correct the line."
                )
            yield row


def _csv_rows(file: Place) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines):
            yield {name: value for name, value in row.items() if name is not None}


def _parquet_rows(file: Place) -> Iterator[dict[str, Any]]:
    with open_parquet(file) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()
