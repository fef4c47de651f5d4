"""Tables of captions that name image files beside them."""

import csv
import io
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from operator import itemgetter
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import quote

import pyarrow as pa

from features.config import DataPlace
from features.errors import SourceError
from features.sources.base import (
    Counts,
    Known,
    Sample,
    SourceReader,
    SourceSettings,
    split_image_suffix,
)
from features.sources.parquet import open_parquet
from features.status import Status
from features.storage.files import is_file, open_file, remote_size
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath

FOLDERS_KEPT = 1024


class ImageFolder:
    """Finds images by their names in a folder; what leads out of it, also by a link, is refused.

    Args:
        folder: What the names are relative to.
        table: What names the images, for messages.
    """

    def __init__(self, folder: Place, table: Place) -> None:
        self._folder = folder.resolve() if isinstance(folder, Path) else folder
        self._table = table
        self._beginning = f"{self._folder}/".replace("//", "/")
        # Many images share a folder, so the links of a folder are followed once.
        self._real = lru_cache(FOLDERS_KEPT)(os.path.realpath)

    def find(self, name: str) -> tuple[str, int | None]:
        """Return the path of an image, and its size or None where there is no such file.

        Raises:
            SourceError: The name leads out of the folder.
        """
        if isinstance(self._folder, RemotePath):
            return self._find_remote(self._folder, name)
        path = str(self._folder / name)
        try:
            self._check(os.path.dirname(path), path, name)  # noqa: PTH120 - of many millions
            about = os.lstat(path)
            if not stat.S_ISREG(about.st_mode):  # a link, or what is no file
                self._check(path, path, name)
                about = Path(path).stat()
        except (OSError, ValueError):  # no file, too long a name, no folder to read, no UTF-8
            return path, None
        return path, about.st_size if stat.S_ISREG(about.st_mode) else None

    def _check(self, looked_at: str, image: str, name: str) -> None:
        if not f"{self._real(looked_at)}/".startswith(self._beginning):
            raise self._outside(name, f", but leads to {os.path.realpath(image)}")

    def _find_remote(self, folder: RemotePath, name: str) -> tuple[str, int | None]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise self._outside(name)
        place = folder / (quote(str(path)) if folder.has_escapes else str(path))
        return str(place), remote_size(place)

    def _outside(self, name: str, target: str = "") -> SourceError:
        return SourceError(
            f"{self._table} names the image {name!r}, which is not inside {self._folder}{target}. "
            f"Correct the table, or put it into the folder that the links lead to."
        )


def place_image(sample: Sample, path: str, size: int | None, counts: Counts) -> None:
    """Say where the image of a sample is; one that is not there is quarantined, and counted."""
    sample.path = path
    if size is not None:
        sample.offset, sample.size = 0, size
    else:
        counts["image files that are not there (quarantined)"] += 1
        sample.problem = sample.problem or int(Status.MISSING_IMAGE)


ROWS_AT_ONCE = 4096
SEPARATOR = re.compile(r"[,;\t]")
QUOTED = re.compile(r'"[^"]*("|$)')
Rows = list[dict[str, Any]]


class FolderSource(SourceSettings):
    """A table of captions (`.jsonl`, `.csv`, `.tsv`, `.parquet`) that names images beside it."""

    kind: Literal["folder"]
    path: DataPlace
    """The table, in UTF-8. Image paths in it are relative to its folder. The first line of a `.csv`
    or `.tsv` names the columns; they are separated by what comes first there of comma, semicolon
    and tab (those between quotation marks do not count)."""
    image: str = "image"
    """Column that names the image file."""

    def _open(self, known: Known) -> "CaptionTable":
        if not is_file(self.path):
            raise SourceError(
                f"There is no table {self.path}. A file ({', '.join(READERS)}) with a column "
                f"{self.image!r} that names images was expected, not their folder. Correct "
                f"`path` of the source."
            )
        return CaptionTable(self, [self.path], known)


class CaptionTable(SourceReader[FolderSource]):
    """Lists the rows of a table that names image files in its folder.

    Rules: rows of the same image that follow each other are one sample, their captions the fields
    0, 1, and on (if that happens anywhere in the table); an image that comes again later is a
    duplicate, quarantined. Label and group are those of its first row. A file that is not there
    keeps a quarantined row. A path that leads out of the folder is refused, also by a link.
    """

    may_be_rewritten = True

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield one sample per image of the table.

        Raises:
            SourceError: The table cannot be read, or a row names no image, or one elsewhere.
        """
        keys = self.keys(file, counts)
        several = self._has_rows_of_one_image(file)
        images = ImageFolder(file.parent, file)
        groups = itertools.groupby(self._named_rows(file), itemgetter(0))
        named = ((name, [row for _, row in rows]) for name, rows in groups)

        def find(image: tuple[str, Rows]) -> tuple[str, Rows, str, int | None]:
            return *image, *images.find(image[0])

        for name, rows, path, size in in_order(find, named, at=file):
            key, problem = keys.of(*split_image_suffix(name))
            sample = Sample(key, problem=problem)
            self.describe(sample, rows[0], counts)
            if several:
                captions = [sample.captions, *(self.picker.pick(row, counts) for row in rows[1:])]
                texts = itertools.chain.from_iterable(each.values() for each in captions)
                sample.captions = {str(i): text for i, text in enumerate(texts)}
            place_image(sample, path, size, counts)
            yield sample

    def _named_rows(self, file: Place) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(table_rows(file), 1):
            name = row.get(self.source.image)
            if not isinstance(name, str) or not name or "\0" in name:
                raise SourceError(
                    f"Row {number} of {file} has {self.source.image} = {name!r}; its columns are "
                    f"{list(row)[:20]}. Set `image` of the source to the column that names the "
                    f"images, or correct the row."
                )
            yield name, row

    def _has_rows_of_one_image(self, file: Place) -> bool:
        pairs = itertools.pairwise(name for name, _ in self._named_rows(file))
        return any(a == b for a, b in pairs)


def table_rows(file: Place) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dictionaries, without holding it in memory.

    Raises:
        SourceError: It is of no kind we read, or damaged.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise SourceError(
            f"The table {file} ends in {file.suffix!r}. One of {', '.join(READERS)} was expected. "
            f"Convert it."
        )
    try:
        yield from reader(file)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise SourceError(
            f"The table {file} cannot be read: {error}. Save it as UTF-8 (of Excel: CSV UTF-8), or "
            f"fetch it again."
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
                    f"Line {number} of {file} is not a JSON object. Correct the line."
                )
            yield row


def _csv_rows(file: Place) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .csv, strictly: a quotation mark left open would swallow those below."""
    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
        all_lines = itertools.chain([header], lines)
        rows = csv.DictReader(all_lines, delimiter=_separator(header), strict=True)
        line = 1
        try:
            columns = rows.fieldnames or []
            if twice := [name for name in columns if name and columns.count(name) > 1]:
                raise csv.Error(f"it names {twice[0]!r} twice, so that one would be lost")
            line = rows.line_num + 1
            for row in rows:
                if any(row.pop(None, ())):
                    raise csv.Error(f"it has more columns than the first line, {columns}")
                yield row
                line = rows.line_num + 1
        except csv.Error as error:
            raise SourceError(
                f"Line {line} of {file} cannot be read: {error}. A name of its own for each column "
                f"was expected, and quotation marks around text with a separator, quotation mark "
                f'or line break in it, as "a ""cat""". Correct the line, or save the table anew.'
            ) from error


def _separator(header: str) -> str:
    """Return the first comma, semicolon or tab of a line, but for those in quotation marks."""
    found = SEPARATOR.search(QUOTED.sub("", header))
    return found[0] if found else ","


def _parquet_rows(file: Place) -> Iterator[dict[str, Any]]:
    with open_parquet(file) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


READERS: Mapping[str, Callable[[Place], Iterator[dict[str, Any]]]] = MappingProxyType(
    {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
)
