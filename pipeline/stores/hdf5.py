"""HDF5 files, for tools that read HDF5 and not Zarr.

A file that `sail convert` wrote has the tree of the store (docs/store.md): a dataset for every
array, chunked by the same rows, and every attribute as JSON text. Any other file is datasets by
name.
"""

import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from features.errors import SailError, SourceError, StoreError
from features.status import Status
from features.storage.column import encoder_of
from features.storage.reading import check_regular, reading
from features.storage.rows import NUMBERS
from features.store import FORMAT
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.stores.arrays import Arrays, Reader, of_form
from pipeline.stores.blocks import STRINGS, Layout
from pipeline.stores.resumable import unfinished
from pipeline.stores.writer import StoreRows

FORMAT_VERSION = 1
"""Of the file, which has no checksums."""
TEXT = h5py.string_dtype("utf-8")
EXPECTED = of_form("An HDF5 file")
OURS = of_form("An HDF5 file as `sail convert --to hdf5` writes it")
MAX_CHUNK_BYTES = 1 << 30


def write(rows: StoreRows, out: Path, stop: StopRequest) -> Path:
    """Write a store as an HDF5 file, in place of an older one.

    A process that is killed while it changes the tree of an HDF5 file leaves nothing readable. So
    the tree is made in one go: all texts and numbers, and room for every chunk of the columns. What
    follows, which is nearly all of the file, only fills that room. At last all of it is read back
    and compared.
    """
    if out.is_dir():
        raise StoreError(f"{out} is a folder. A file was expected. Give another --out.")
    layout, size = rows.layout, rows.layout.rows_per_chunk
    starts = range(0, layout.rows, size)
    ours = [name for name in layout.array_names if name not in layout.names]
    with (
        unfinished(out, "hdf5", layout.to_json(), rows.stamp) as work,
        ProgressLine(out.name, None, "chunks") as line,
    ):
        if not work.done:
            with _opened(work.made, "w") as (file, _):
                _create(file, layout)
                for start in starts:
                    _write(file, layout.names, rows, start, stop)
            _reserve(work.made)
            work.advance(work.made)
        line.set(work.done - 1, len(starts))
        with _opened(work.made, "r+") as (file, disk):
            for start in starts[work.done - 1 :]:
                _write(file, ours, rows, start, stop)
                file.flush()
                disk.check()
                work.advance(work.made)
                line.advance(1)
        _compare(work.made, rows, starts, stop)
        work.publish(out)
    return out


class _Disk(io.FileIO):
    """The file that HDF5 writes into; keeps the first failure for `check`.

    HDF5 loses a failed write that it makes while it closes a data set, and crashes at the exit of
    the process after one that it could not lose. So it hears of none.
    """

    _error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, as long as nothing has failed."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self._error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Change the length, as long as nothing has failed."""
        try:
            return self.tell() if self._error else super().truncate(size)
        except OSError as error:
            self._error = error
            return 0

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, self.name)


@contextmanager
def _opened(path: Path, mode: Literal["w", "r+"]) -> Iterator[tuple[h5py.File, _Disk]]:
    with _Disk(path, "w+" if mode == "w" else "r+") as disk:
        with h5py.File(disk, mode) as file:
            yield file, disk
        disk.check()


def _compare(path: Path, rows: StoreRows, starts: Sequence[int], stop: StopRequest) -> None:
    """Read the file back, and compare every value to the store."""
    with h5py.File(path, "r") as file:
        for start in starts:
            stop.check()
            part = slice(start, min(start + rows.layout.rows_per_chunk, rows.layout.rows))
            for name, values in rows.some(rows.layout.array_names, part.start, part.stop).items():
                found = _values(file[name], part.start, part.stop)
                is_equal = found.dtype == values.dtype and (
                    bool((found == values).all())
                    if values.dtype == STRINGS
                    else found.tobytes() == values.tobytes()  # also where it is not a number
                )
                if not is_equal:
                    raise StoreError(
                        f"{name}, rows {part.start} to {part.stop - 1}, is not in the HDF5 file as "
                        f"it is in {rows.store.path}. Equal values were expected when it was read "
                        f"back; the file is not kept. Check the disk, and run the command again."
                    )


class Hdf5Arrays(Arrays):
    """The datasets of an HDF5 file. Links to other files are not followed."""

    expected = EXPECTED

    def _open(self, path: Path, stack: ExitStack) -> None:
        self.files = (path,)
        file = stack.enter_context(h5py.File(check_regular(path), "r"))

        def see(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.shape is not None:
                if item.is_virtual or item.external:
                    raise EXPECTED.refusal(path, f"{name} keeps its values in another file")
                self._add(name, item.shape, _stored(item))

        file.visititems(see)  # follows no link
        is_ours = file.attrs.get("format") == json.dumps(FORMAT)
        self.layout = _layout(path, file, self.shapes) if is_ours else None


def _stored(dataset: h5py.Dataset) -> Reader:
    """Return what reads a dataset whose values are all in the file: any shape can be declared."""

    @cache
    def check() -> None:
        size = dataset.dtype.itemsize * math.prod(dataset.chunks or (0,))
        if size > MAX_CHUNK_BYTES:
            raise ValueError(f"{dataset.name} has chunks of {size} bytes")
        if dataset.chunks is None:
            found, wanted = dataset.id.get_storage_size(), dataset.nbytes
        else:
            per_axis = zip(dataset.shape, dataset.chunks, strict=True)
            found = dataset.id.get_num_chunks()
            wanted = math.prod(-(-length // chunk) for length, chunk in per_axis)
        if found < wanted:
            what = "bytes" if dataset.chunks is None else "chunks"
            raise ValueError(
                f"{dataset.name} has shape {dataset.shape}, of which {found} of "
                f"{wanted} {what} are there"
            )

    def read(start: int, stop: int) -> np.ndarray:
        check()
        return _values(dataset, start, stop)

    return read


def _values(dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    if h5py.check_string_dtype(dataset.dtype) is None:
        return np.asarray(dataset[start:stop])
    try:
        return np.asarray(dataset.asstr()[start:stop].astype(STRINGS))
    except UnicodeDecodeError as error:
        raise SourceError(
            f"The texts {dataset.name} of {dataset.file.filename} cannot be read: {error.object!r} "
            f"is not UTF-8. HDF5 knows ASCII and UTF-8 alone. Write them again "
            f"as UTF-8, or take others with --take."
        ) from error


def _create(file: h5py.File, layout: Layout) -> None:
    chunk = min(layout.rows, layout.rows_per_chunk)
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rows": layout.rows,
        "rows_per_chunk": layout.rows_per_chunk,
        "keys_sha256": layout.keys_sha256,
        "source": dict(layout.source),
    }
    _write_attributes(file, attributes)
    for name in layout.names:
        file.create_dataset(
            name, (layout.rows,), np.int32 if name in NUMBERS else TEXT, chunks=(chunk,)
        )
    if layout.class_names is not None:
        _write_attributes(file["label"], {"class_names": list(layout.class_names)})
    for encoder, fingerprint in layout.fingerprints.items():
        _write_attributes(file.require_group(encoder), fingerprint)
    for name, dim in layout.columns.items():
        column = file.require_group(name)
        with_room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        with_room.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        with_room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # all of it is written once, not twice
        column.create_dataset(
            "features", (layout.rows, dim), np.float16, chunks=(chunk, dim), dcpl=with_room
        )
        status = column.create_dataset(
            "status", (layout.rows,), np.uint8, chunks=(chunk,), dcpl=with_room
        )
        _write_attributes(status, {"codes": {code.label: int(code) for code in Status}})


def _reserve(path: Path) -> None:
    """Take the room on the disk now: where it ran out later, h5py would end in tracebacks."""
    if sys.platform != "darwin":  # which has no such call
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _write(
    file: h5py.File, names: Sequence[str], rows: StoreRows, start: int, stop: StopRequest
) -> None:
    stop.check()
    part = slice(start, min(start + rows.layout.rows_per_chunk, rows.layout.rows))
    for name, values in rows.some(names, part.start, part.stop).items():
        _check_texts(name, values, start)
        file[name][part] = values.astype(object) if values.dtype == STRINGS else values


def _check_texts(name: str, values: np.ndarray, start: int) -> None:
    """Refuse a text with a NUL, at which those of HDF5 end."""
    texts = values.tolist() if values.dtype == STRINGS else []
    if with_nul := [row for row, text in enumerate(texts, start) if "\0" in text]:
        raise StoreError(
            f"{name} of row {with_nul[0]} has a NUL character, which no text in "
            f"HDF5 can have. Texts without were expected. Choose another form, such as "
            f"`--to parquet`, or correct the captions and extract them again."
        )


def _layout(path: Path, file: h5py.File, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Read what `_create` wrote."""
    with reading(f"The attributes of {path}", OURS):
        attributes = _attributes(file)
    if attributes.get("format_version") != FORMAT_VERSION:
        raise _not_ours(path, f"it has format_version {attributes.get('format_version')}")
    sizes = [attributes.get(name) for name in ("rows", "rows_per_chunk")]
    counts = [size for size in sizes if isinstance(size, int) and size > 0]
    if len(counts) != len(sizes):
        raise _not_ours(path, f"it has rows and rows_per_chunk = {sizes}")
    rows, size = counts
    columns = [name.rpartition("/")[0] for name in shapes if name.endswith("/features")]
    names = ["key", *(name for name in shapes if name in NUMBERS or name.startswith("caption/"))]
    features = [f"{column}/features" for column in columns]
    for name in [*features, *(f"{column}/status" for column in columns), *names]:
        if name not in shapes:
            column, _, array = name.rpartition("/")
            raise _not_ours(path, f"{column or 'it'} has no {array}")
        found = shapes[name]
        if found[0] != rows or len(found) != (2 if name in features else 1):
            raise _not_ours(path, f"{name} has shape {found}, not {rows} rows")
        if name in features and file[name].dtype != np.float16:
            raise _not_ours(path, f"{name} is {file[name].dtype} of shape {found}")
    class_names = _attributes(file["label"]).get("class_names") if "label" in shapes else None
    encoders = dict.fromkeys(map(encoder_of, columns))
    return Layout(
        rows=rows,
        rows_per_chunk=size,
        names=tuple(names),
        columns={column: shapes[f"{column}/features"][1] for column in columns},
        fingerprints={encoder: _attributes(file[encoder]) for encoder in encoders},
        class_names=tuple(class_names) if class_names else None,
        source=attributes.get("source", {}),
        keys_sha256=attributes.get("keys_sha256"),
    )


def _not_ours(path: Path, why: str) -> SailError:
    return OURS.refusal(path, why)


def _write_attributes(target: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        target.attrs[name] = json.dumps(value, ensure_ascii=False)


def _attributes(source: Any) -> dict[str, Any]:
    names = list(source.attrs)  # an iterator of h5py that is left half-way keeps its global lock
    return {name: json.loads(source.attrs[name]) for name in names}


read = Hdf5Arrays
