"""The index: one parquet file per split that gives every sample a row before anything is encoded.

So the number of rows is known, work can be cut into chunk-aligned units, and images are read by
place. Columns: `key`, `path`, `offset`, `size`, `problem`, `label`, `group`, `caption/<field>`, and
`box` where samples are parts of images; see `features.sources.sample.Sample`. The metadata of the
file hold the source's settings, its files with size and time, and counts of everything that was
handled by rule.
"""

import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.config import ExtractConfig, Source
from features.errors import FileEndsEarlyError, SourceError
from features.index_builder import (
    BOX,
    COLUMNS,
    METADATA_KEY,
    ROWS_PER_GROUP,
    VERSION,
    build_index,
    settings_of,
)
from features.sources import Sample
from features.sources.cifar import as_image_file
from features.sources.parquet import ParquetImages
from features.status import Status
from features.storage import files
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath, as_place
from features.storage.requests import read_ranges

GROUPS_KEPT = 4
MAX_PIXELS = ExtractConfig().max_pixels
NEVER_READ = (Status.MISSING_IMAGE, Status.IMAGE_TOO_LARGE)


class Index:
    """An index on disk; any number of threads may share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pq.ParquetFile(path)
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[int, tuple[str, ...] | None], pa.Table] = OrderedDict()
        about = json.loads(self._file.metadata.metadata[METADATA_KEY])
        if about["version"] != VERSION:
            raise ValueError(f"it has version {about['version']}, this program reads {VERSION}")
        self.rows: int = self._file.metadata.num_rows
        self.fields: tuple[str, ...] = tuple(about["fields"])
        self.class_names: tuple[str, ...] | None = (
            tuple(about["class_names"]) if about["class_names"] else None
        )
        self.has_boxes = "box" in self._file.schema_arrow.names
        self.columns: tuple[str, ...] = (*COLUMNS, *(BOX if self.has_boxes else ()))
        """All but the captions."""
        self.has_labels: bool = about["has_labels"]
        self.has_groups: bool = about["has_groups"]
        self.counts: dict[str, int] = about["counts"]
        """How many members, samples and captions were handled by which rule."""
        self.source: dict[str, Any] = about["source"]
        self.shards: dict[Place, dict[str, Any]] = {
            as_place(shard["path"]): shard for shard in about["shards"]
        }
        """Files (or folders) in the order of their rows: `name`, and `size_and_time` as indexed."""
        self.grown_from: tuple[int, ...] = tuple(about["grown_from"])
        """Rows there were before each time that rows were appended."""

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Open an index.

        Raises:
            SourceError: It is missing, damaged, or was not written by this program.
        """
        try:
            return cls(path)
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise SourceError(
                f"The index {path} cannot be read ({error}). An index written by `sail extract` "
                f"was expected. Delete it and run `sail extract` again."
            ) from error

    @classmethod
    def build(
        cls, source: Source, path: Path, *, on_progress: Callable[[int], None] | None = None
    ) -> "Index":
        """List every sample of a source, and write the index: all of it, or nothing.

        Args:
            source: What to list.
            path: Where the index goes.
            on_progress: Called now and then with the number of samples since the last call.

        Raises:
            SourceError: A shard is damaged, or there is no sample at all.
        """
        build_index(source, path, on_progress or (lambda _: None))
        return cls.open(path)

    def matches(self, source: Source) -> bool:
        """Return whether the index was built from these settings."""
        return bool(self.source == settings_of(source))

    @property
    def names(self) -> dict[Place, str]:
        """Files in the order of their rows, with what their keys begin with."""
        return {path: str(shard["name"]) for path, shard in self.shards.items()}

    def samples(self) -> Iterator[Sample]:
        """Yield all rows as they were listed."""
        for table in self.batches(ROWS_PER_GROUP):
            names = list(self.columns)
            captions = [table.column(f"caption/{field}").to_pylist() for field in self.fields]
            columns = zip(*(table.column(name).to_pylist() for name in names), strict=True)
            texts = zip(*captions, strict=True) if captions else itertools.repeat(())
            for values, row_texts in zip(columns, texts, strict=bool(captions)):
                row_captions = dict(zip(self.fields, row_texts, strict=True))
                yield Sample(**dict(zip(names, values, strict=True)), captions=row_captions)

    def batches(
        self, rows: int, columns: tuple[str, ...] | None = None, *, first: int = 0
    ) -> Iterator[pa.Table]:
        """Yield tables of `rows` rows, from one on, the last shorter; keep nothing afterwards."""
        for start in range(first, self.rows, rows):
            yield self.rows_between(start, min(start + rows, self.rows), columns)
        with self._lock:
            self._groups.clear()

    def rows_between(
        self, start: int, stop: int, columns: tuple[str, ...] | None = None
    ) -> pa.Table:
        """Return rows `start` to `stop` without reading the rest of the file.

        Args:
            start: First row.
            stop: Row behind the last.
            columns: Names of the columns to read; all if not given.
        """
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of an index of {self.rows} rows")
        first = min(start, self.rows - 1) // ROWS_PER_GROUP
        last = max(first + 1, -(-stop // ROWS_PER_GROUP))
        tables = [self._group(number, columns) for number in range(first, last)]
        return pa.concat_tables(tables).slice(start - first * ROWS_PER_GROUP, stop - start)

    def _group(self, number: int, columns: tuple[str, ...] | None) -> pa.Table:
        wanted = (number, columns)
        with self._lock:
            if wanted not in self._groups:
                while len(self._groups) >= GROUPS_KEPT:
                    self._groups.popitem(last=False)
                self._groups[wanted] = self._file.read_row_group(
                    number, columns=None if columns is None else list(columns)
                )
            self._groups.move_to_end(wanted)
            return self._groups[wanted]


class SampleReader:
    """Reads the image bytes of rows, by place; any number of threads may share one.

    Args:
        index: Says where they are.
        max_pixels: Of an image larger than that no part is cut out: it comes whole, to be refused.
    """

    def __init__(self, index: Index, *, max_pixels: int = MAX_PIXELS) -> None:
        self.index = index
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._parquet: ParquetImages | None = None
        self._is_cifar = index.source["kind"] == "cifar"
        if index.source["kind"] == "parquet":
            self._parquet = ParquetImages(index.source["image"])

    def read(self, start: int, stop: int) -> list[bytes | None]:
        """Return the encoded image of each row, None where the index has none.

        Each file is opened once, and read from its front to its back; under a URL, near images
        come with one request, and image files many at once.

        Raises:
            SourceError: A file is missing or shorter than it was when it was indexed.
        """
        table = self.index.rows_between(start, stop, ("path", "offset", "size", "problem"))
        images: list[bytes | None] = [None] * table.num_rows
        listed = enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True))
        there = (
            (i, path, offset, size)
            for i, (path, offset, size, problem) in listed
            if offset >= 0 and problem not in NEVER_READ
        )
        groups = itertools.groupby(there, key=lambda item: item[1])
        jobs = [(as_place(path), list(group)) for path, group in groups]
        remote = len(jobs) > 1 and isinstance(jobs[0][0], RemotePath)
        parts = in_order(self._read, jobs, remote=remote)
        for (_, group), found in zip(jobs, parts, strict=True):
            for (row, *_), image in zip(group, found, strict=True):
                images[row] = as_image_file(image) if image and self._is_cifar else image
        return self._parts(images, start) if self.index.has_boxes else images

    def read_row(self, row: int) -> bytes | None:
        """Return the encoded image of one row, None where the index has none."""
        return self.read(row, row + 1)[0]

    def _parts(self, images: Sequence[bytes | None], start: int) -> list[bytes | None]:
        """Cut the box of each row out of its image."""
        from features.images import cut_out  # torch comes with it, and is mostly not needed

        boxes = self.index.rows_between(start, start + len(images), ("box",)).column("box")
        return [
            cut_out(image, box, max_pixels=self._max_pixels) if image and box else image
            for image, box in zip(images, boxes.to_pylist(), strict=True)
        ]

    def _read(self, job: tuple[Place, list[tuple[int, str, int, int]]]) -> Sequence[bytes | None]:
        place, group = job
        _, paths, offsets, sizes = zip(*group, strict=True)
        if self._parquet is not None:
            with self._lock:
                return self._parquet.read(paths[0], offsets)
        if isinstance(place, RemotePath):
            return self._read_remote(place, offsets, sizes)
        return self._read_file(paths[0], offsets, sizes)

    def _read_remote(
        self, place: RemotePath, offsets: Sequence[int], sizes: Sequence[int]
    ) -> Sequence[bytes]:
        """Read images under a URL: a file of its own whole, those in a tar by their ranges."""
        if offsets[0] == 0:
            image = files.read(place)
            if len(image) != sizes[0]:
                raise self._changed(str(place), f"has {len(image)} bytes and had {sizes[0]}")
            return [image] * len(offsets)
        ranges = [(start, start + size) for start, size in zip(offsets, sizes, strict=True)]
        try:
            return list(map(bytes, read_ranges(place, ranges)))
        except FileEndsEarlyError as error:
            raise self._changed(str(place), f"has {error.size} bytes") from error

    def _read_file(
        self, path: str, offsets: Sequence[int], sizes: Sequence[int]
    ) -> list[bytes | None]:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be opened ({error.strerror}). The file of the index "
                f"{self.index.path} was expected. Restore it, or index again."
            ) from error
        try:
            return [
                self._range(file, path, offset, size)
                for offset, size in zip(offsets, sizes, strict=True)
            ]
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read ({error.strerror}). The file of the index "
                f"{self.index.path} was expected. Check the disk, and run the command again."
            ) from error
        finally:
            os.close(file)

    def _range(self, file: int, path: str, offset: int, size: int) -> bytes:
        image = os.pread(file, size, offset)
        if len(image) != size:
            raise self._changed(path, f"ends at byte {offset + len(image)}, within an image")
        if offset == 0 and os.fstat(file).st_size != size:  # within a tar, offsets are from 512
            raise self._changed(path, f"has {os.fstat(file).st_size} bytes and had {size}")
        return image

    def _changed(self, path: str, what: str) -> SourceError:
        return SourceError(
            f"{path} {what}. The file as it was when {self.index.path} was written was expected. "
            f"Restore it, or delete the index and the store to start again."
        )
