"""Reads tables row by row: `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`."""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from features.errors import SourceError
from features.sources.base import split_image_suffix
from features.sources.parquet import check_names_differ, open_parquet
from features.sources.text import encoding_of
from features.storage.files import open_file
from features.storage.place import Place
from features.storage.reading import limited_lines

ROWS_AT_ONCE = 4096
SEPARATOR = re.compile(r"[,;\t|]")
TOLD_SEPARATOR = re.compile(r'"?sep=(.)"?')
QUOTED = re.compile(r'"[^"]*("|$)')
MAX_FIELD_BYTES = 1 << 24
csv.field_size_limit(MAX_FIELD_BYTES)  # 128 KiB are too little for a long description
Rows = Iterator[dict[str, Any]]


def table_rows(file: Place, encoding: str | None = None) -> Rows:
    """Yield the rows of a table as dictionaries, without holding it in memory.

    Args:
        file: The table.
        encoding: Of its text, where that has no byte order mark; UTF-8 if not given.

    Raises:
        SourceError: It is of no kind we read, or damaged.
    """
    reader = READERS.get(table_suffix(file))
    if reader is None:
        raise SourceError(
            f"The table {file} ends in {file.suffix!r}. One of {', '.join(READERS)} was expected. "
            f"Convert it."
        )
    try:
        yield from reader(file, encoding)
    except UnicodeError as error:
        raise SourceError(
            f"The table {file} cannot be read: {error}. Set `encoding` of the source to what it is "
            f"in (of Excel's plain CSV mostly 'cp1252'), or save it as UTF-8 (of Excel: CSV UTF-8)."
        ) from error
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise SourceError(f"The table {file} cannot be read: {error}. Fetch it again.") from error


def table_suffix(file: Place) -> str:
    """Return the suffix of a table in lower case, of one in gzip that before `.gz`."""
    name = file.name.lower()
    suffix = PurePosixPath(name.removesuffix(".gz")).suffix
    return "" if suffix == ".parquet" and name.endswith(".gz") else suffix


def _open_text(file: Place, encoding: str | None, newline: str | None = None) -> io.TextIOWrapper:
    with ExitStack() as until_opened:
        content: Any = until_opened.enter_context(open_file(file))
        if file.suffix.lower() == ".gz":
            packed, content = content, until_opened.enter_context(gzip.GzipFile(fileobj=content))
            content.myfileobj = packed  # which is closed with it
        name, skipped = encoding_of(content.read(4), encoding)
        content.seek(skipped)
        until_opened.pop_all()
    return io.TextIOWrapper(content, encoding=name, newline=newline)


def _jsonl_rows(file: Place, encoding: str | None) -> Rows:
    with _open_text(file, encoding) as lines:
        for number, line in enumerate(limited_lines(lines, file), 1):
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


def _json_rows(file: Place, encoding: str | None) -> Rows:
    """Yield the objects of a JSON list; some write the lines of a `.jsonl` under this name."""
    with _open_text(file, encoding) as lines:
        text = lines.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("["):
            yield from _jsonl_rows(file, encoding)
            return
        raise SourceError(
            f"{file} is not whole JSON: {error}. A list of objects was expected. Fetch it again."
        ) from error
    for number, row in enumerate(_listed(rows) if isinstance(rows, dict) else rows):
        if not isinstance(row, dict):
            raise SourceError(f"Item {number} of {file} is not a JSON object. Correct it.")
        yield row


def _listed(document: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of a JSON object: captions by image, one list of rows, or one row."""
    lists = [value for value in document.values() if _is_list_of(value, dict)]
    if len(document) and all(split_image_suffix(name)[1] for name in document):
        several = any(isinstance(value, list) for value in document.values())
        for name, value in document.items():
            alone = several and isinstance(value, str)
            yield {"image": name, "captions" if several else "caption": [value] if alone else value}
    elif len(lists) == 1:
        yield from lists[0]
    else:
        yield document


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def _csv_rows(file: Place, encoding: str | None) -> Rows:
    """Yield the rows of a .csv, strictly: a quotation mark left open would swallow those below."""
    with _open_text(file, encoding, newline="") as lines:
        header = lines.readline()
        told = TOLD_SEPARATOR.fullmatch(header.strip("\r\n"))
        if told:  # a line that Excel writes and reads
            header = lines.readline()
        all_lines = itertools.chain([header], limited_lines(lines, file))
        separator, is_spaced = _separator(header)
        if told:
            separator = told[1]
        rows = csv.DictReader(
            all_lines, delimiter=separator, strict=True, skipinitialspace=is_spaced
        )
        line = 1
        try:
            columns = [name.strip() for name in rows.fieldnames or []]
            rows.fieldnames = columns
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
                f"Line {line + bool(told)} of {file} cannot be read: {error}. A name of its own "
                f"for each column was expected, and quotation marks around text with a separator, "
                f'quotation mark or line break in it, as "a ""cat""", of at most '
                f"{MAX_FIELD_BYTES:,} bytes. Correct the line, or save the table anew."
            ) from error


def _separator(header: str) -> tuple[str, bool]:
    """Return the first comma, semicolon, tab or bar of a line, but for those in quotation marks.

    And whether blanks follow it everywhere in the line, which then are no part of the names.
    """
    plain = QUOTED.sub('""', header).rstrip()
    found = SEPARATOR.search(plain)
    if found is None:
        return ",", False
    rest = plain.split(found[0])[1:]
    return found[0], all(each.startswith(" ") for each in rest if each)


def _parquet_rows(file: Place, _: str | None) -> Rows:
    with open_parquet(file) as parquet:
        check_names_differ(file, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


READERS: Mapping[str, Callable[[Place, str | None], Rows]] = MappingProxyType(
    {
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".txt": _csv_rows,
        ".parquet": _parquet_rows,
    }
)
