"""Whether a store is whole, and the one that was written (`sail verify`)."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import zarr

from features.errors import SailError, StoreCorruptError
from features.status import Status
from features.storage.chunks import crc32c_behind
from features.storage.column import Column, create_identity, describe_column, encoder_of
from features.storage.files import NAME, children, files_below, is_file, write
from features.storage.identity import Identities
from features.storage.manifest import (
    FILE,
    METADATA,
    Manifest,
    describe,
    digest_of,
    read_metadata,
    write_manifest,
)
from features.storage.place import Place, can_be_listed
from features.storage.rows import metadata_of_rows
from features.store import FORMAT_VERSION, RESERVED, FeatureStore
from pipeline.stores.writer import KeyCheck

T = TypeVar("T")
SHOWN = 3
"""Rows of a chunk that are named for one kind of fault."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file of a store."""

    place: str
    what: str
    remedy: str = "Run `sail repair` to write it again."
    column: str | None = None
    """The column that it belongs to, if encoding a chunk again mends it."""
    chunk: int | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.what}. {self.remedy}"


def verify_store(path: Place) -> list[str]:
    """Return what is wrong with a store, a sentence or two for each fault; see `find_faults`."""
    return [str(fault) for fault in find_faults(path)]


def find_faults(path: Place) -> list[Fault]:
    """Read every file of a store and return what is wrong.

    Checked: that every file is the one that was written (in a store of version 1: that checksums
    and lengths fit); that keys are unique and those that were written; that every row is accounted
    for; that rows that are ok are finite and not zero, and the others are zero; that there are no
    other files.

    Raises:
        StoreNotFoundError: There is no store.
        StoreError: It is of another format.
    """
    try:
        store = FeatureStore.open(path)
    except StoreCorruptError as error:
        return [_fault(error)]
    faults = [*_metadata_faults(store, ""), *_row_faults(store)]
    columns = []
    for name in _columns_there(store):
        faults += _metadata_faults(store, name)
        column, fault = _tried(lambda name=name: store.column(name))  # type: ignore[misc]
        faults += [fault] if fault else []
        if column is not None:
            columns.append(column)
            faults += _column_faults(column)
    return [*dict.fromkeys([*faults, *_files_too_many(store, columns)])]


def seal_store(path: Path) -> list[Fault]:
    """Make a store of version 1 one of version 2: write down what each of its files is.

    Killed at any moment, it is of version 1 still, and the next call does it.

    Returns:
        What is wrong with it, and then it is left as it is. A store of version 2 is only verified.
    """
    if faults := find_faults(path):
        return faults
    store = FeatureStore.open(path)
    if store.manifest is not None:
        return []
    document = {name: it for name, it in store.document.items() if name != "consolidated_metadata"}
    document["attributes"] = document["attributes"] | {"format_version": FORMAT_VERSION}
    names = metadata_of_rows(store.row_arrays)
    there = [name for name in names if is_file(path / name / METADATA)]
    contents = describe(path, there, dict.fromkeys(sorted(store.row_arrays), store.num_chunks))
    contents["metadata"][METADATA] = digest_of(document)
    keys = contents["arrays"]["key"]["crc32"]
    group = zarr.open_group(path, mode="r+")
    for name in store.columns():
        column, arrays = store.column(name), ["features", "status", "identity"]
        arrays += ["scale"] if column.is_scaled else []
        create_identity(group.require_group(name), column.num_chunks, overwrite=True)
        about = describe_column(path, name, arrays)
        encoder = about["metadata"][f"{encoder_of(name)}/{METADATA}"]
        identities = Identities(column.path, name, lambda chunk: [keys[chunk]], [encoder])
        for chunk in range(column.num_chunks):
            files = {"features": column.features_file, "status": column.status_file}
            files |= {"scale": column.scale_file} if column.is_scaled else {}
            crcs = {part: crc32c_behind(Path(str(file(chunk)))) for part, file in files.items()}
            identities.write(chunk, **({"scale": 0} | crcs))
        write_manifest(path, about, name)
    write_manifest(path, contents)
    write(path / METADATA, json.dumps(document, indent=2).encode())
    return []


def _fault(error: StoreCorruptError, column: str | None = None, chunk: int | None = None) -> Fault:
    return Fault(str(error.place), error.what, column=column, chunk=chunk)


def _tried(read: Callable[[], T]) -> tuple[T | None, Fault | None]:
    """Return what a call returns, or what it found wrong."""
    try:
        return read(), None
    except StoreCorruptError as error:
        return None, _fault(error)
    except SailError as error:
        return None, Fault(str(error), "it cannot be read")


def _columns_there(store: FeatureStore) -> list[str]:
    """Return the columns for which there is a folder, with or without metadata."""
    if not can_be_listed(store.path):
        return store.columns()
    images = [f"image/{name}" for name in _folders(store.path / "image")]
    texts = [f"text/{name}" for name in _folders(store.path / "text")]
    fields = [f"{text}/{name}" for text in texts for name in _folders(store.path / text)]
    return [*images, *fields]


def _folders(folder: Place) -> list[str]:
    found = children(folder)
    return [
        name for name, size in found if size is None and name not in RESERVED and name[0] != "."
    ]


def _metadata_faults(store: FeatureStore, part: str) -> Iterator[Fault]:
    """Compare the metadata that the manifest of the store, or of a column, speaks of."""
    if store.manifest is None:
        return
    manifest, error = _tried(lambda: Manifest.open(store.path, part))
    if manifest is None:
        place = str(store.path / part / FILE if part else store.path / FILE)
        yield error or Fault(place, "the file is missing")
        return
    if manifest.is_growing:
        yield Fault(
            str(store.path / part if part else store.path),
            "rows are being appended, or a command that did was killed",
            "Run `sail extract` to finish it.",
        )
    for name in manifest.contents["metadata"]:
        place = name.removesuffix(METADATA).rstrip("/")

        def check(name: str = name, place: str = place, manifest: Manifest = manifest) -> None:
            manifest.check(place, read_metadata(store.path / name))

        _, error = _tried(check)
        if error is not None:
            yield error


def _row_faults(store: FeatureStore) -> Iterator[Fault]:
    size, are_keys_whole = store.rows_per_chunk, True
    check = KeyCheck(store.rows)
    for name in store.stored_arrays:
        for start in range(0, store.rows, size):
            values, error = _tried(lambda n=name, s=start: store.values(n, s, s + size))  # type: ignore[misc]
            if error is not None:
                yield error
                are_keys_whole &= name != "key"
            elif name == "key" and values is not None:
                check.add(values)
    if not are_keys_whole:
        return
    for _, row in check.repeated():
        key = str(store.keys(row, row + 1)[0])
        yield Fault(
            f"row {row}", f"the key {key!r} occurs twice; keys are unique", "Extract again."
        )
    if check.sha256 != store.keys_sha256:
        yield Fault(
            str(store.path / "key"),
            f"the keys have sha256 {check.sha256[:12]}…, the store was made with "
            f"{store.keys_sha256[:12]}…: rows and features may not belong together",
            "Extract again.",
        )


def _column_faults(column: Column) -> Iterator[Fault]:
    buffer = np.empty((column.rows_per_chunk, column.dim), dtype=column.dtype)
    pending = set(column.pending())
    for chunk in range(column.num_chunks):
        if chunk in pending:
            what = f"chunk {chunk} is not done"
            yield Fault(str(column.path), what, "Run `sail extract` again to finish it.")
            continue
        try:
            status = column.chunk_status(chunk)
            rows = column.read_into(chunk, buffer, verify=True)
            features = column.restored(chunk, buffer[:rows])
        except StoreCorruptError as error:
            yield _fault(error, column.name, chunk)
            continue
        if buffer[rows:].any():
            what = "values follow its last row"
            yield Fault(str(column.features_file(chunk)), what, column=column.name, chunk=chunk)
        yield from _value_faults(column, chunk, features, status)


def _value_faults(
    column: Column, chunk: int, features: np.ndarray, status: np.ndarray
) -> Iterator[Fault]:
    ok = status == Status.OK
    zero = ~features.any(axis=1)
    known = np.isin(status, [int(code) for code in Status if code != Status.PENDING])
    checks = [
        (ok & ~np.isfinite(features).all(axis=1), "is ok but holds NaN or infinity"),
        (ok & zero, "is ok but all zero"),
        (~ok & ~zero, "is quarantined but not zero"),
        (~known, "has an unknown status"),
    ]
    for wrong, what in checks:
        for i in np.flatnonzero(wrong)[:SHOWN]:
            row = chunk * column.rows_per_chunk + i
            yield Fault(str(column.path), f"row {row} {what}", column=column.name, chunk=chunk)


def _files_too_many(store: FeatureStore, columns: list[Column]) -> Iterator[Fault]:
    """Find files that no reader expects: chunks beyond the end, or anything else."""
    if not can_be_listed(store.path):
        return
    names, num_chunks = set(store.stored_arrays), store.num_chunks
    if store.manifest is not None:  # a store that grows has files of rows to come
        to_come = store.manifest.after["arrays"]
        names |= set(to_come)
        num_chunks = max(num_chunks, *(len(files["bytes"]) for files in to_come.values()))
    chunks = range(num_chunks)
    expected = {f"{path}/{METADATA}".lstrip("/") for path in metadata_of_rows(names)}
    expected |= {f"{name}/c/{chunk}" for name in names for chunk in chunks}
    expected.add(FILE)
    for column in columns:
        kind, encoder, *_ = column.name.split("/")
        arrays = ["features", "status", "identity", *(["scale"] if column.is_scaled else [])]
        expected |= {f"{column.name}/{FILE}", f"{kind}/{encoder}/{METADATA}"}
        expected |= {
            f"{column.name}/{array}/{METADATA}".replace("//", "/") for array in ("", *arrays)
        }
        for array in arrays:
            ending = "/0" if array in ("features", "identity") else ""
            expected |= {f"{column.name}/{array}/c/{chunk}{ending}" for chunk in chunks}
    begin = len(str(store.path)) + 1
    opened = {column.name for column in columns}
    closed = [f"{name}/" for name in _columns_there(store) if name not in opened]
    for place, _ in files_below(store.path):
        name = str(place)[begin:]
        parts = name.split("/")
        if name in expected or any(NAME.fullmatch(part) for part in parts):
            continue
        if name.startswith(tuple(closed)):
            continue  # of a column that cannot be opened, which is named already
        yield Fault(str(place), "it is no file of the store", "Delete it, or put it elsewhere.")
