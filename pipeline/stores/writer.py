"""A feature store as rows, and the one writer that makes a store of any rows."""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import zarr
from jaxtyping import UInt64

from features.errors import SourceError, StoreError
from features.status import Status
from features.storage.column import (
    Column,
    create_column,
    dequantise,
    describe_column,
    encoder_of,
)
from features.storage.files import write
from features.storage.groups import publish
from features.storage.manifest import METADATA, read_metadata, write_manifest
from features.storage.place import Place
from features.storage.remote import check_writable
from features.storage.rows import (
    KEY_HASH,
    NUMBERS,
    RowArray,
    key_hashes,
    write_block,
    write_store_manifest,
)
from features.store import FORMAT_VERSION, FeatureStore, create_group
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.stores.blocks import Block, Layout, Rows, chunks_of
from pipeline.stores.resumable import check_free, unfinished

logger = logging.getLogger(__name__)


class StoreRows:
    """The rows of a store. Every checksum is looked at."""

    def __init__(self, store: FeatureStore, *, restored: bool = True) -> None:
        """Open the columns of a store.

        Args:
            store: Every chunk of its columns must be done.
            restored: Whether features in 8 bits come as the float16 values they stand for.

        Raises:
            StoreError: A column has chunks that are not done.
        """
        self.store = store
        columns = complete_columns(store)
        self._restored = [column.name for column in columns if column.is_scaled and restored]
        numbers = {"label": store.labels(), "group": store.groups()}
        self.layout = Layout(
            rows=store.rows,
            rows_per_chunk=store.rows_per_chunk,
            names=(
                "key",
                *(f"caption/{field}" for field in store.fields),
                *(name for name in NUMBERS if numbers[name] is not None),
            ),
            columns={column.name: column.dim for column in columns},
            scaled=tuple(column.name for column in columns if column.is_scaled and not restored),
            fingerprints={encoder_of(column.name): column.fingerprint for column in columns},
            class_names=store.class_names,
            source=store.source,
            keys_sha256=store.keys_sha256,
        )
        self._columns = {column.name: column for column in columns}
        self._status = {column.name: column.status() for column in columns}

    @property
    def stamp(self) -> str:
        """The keys and a checksum of every column: 4 bytes of each chunk are read."""
        checksums = [self.store.column(name).checksum() for name in self.layout.columns]
        return " ".join([str(self.store.path), self.store.keys_sha256, *checksums])

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`, as `some` does."""
        return self.some(self.layout.array_names, start, stop)

    def some(self, names: Iterable[str], start: int, stop: int) -> Block:
        """Return rows `start` to `stop` of some arrays.

        Raises:
            StoreCorruptError: A chunk of theirs is damaged or missing.
        """
        block = {name: self._read(name, start, stop) for name in names}
        for column in self._restored:
            if (name := f"{column}/features") in block:
                scale = self._read(f"{column}/scale", start, stop)
                block[name] = dequantise(block[name], scale)
        return block

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        owner, _, part = name.rpartition("/")
        if (column := self._columns.get(owner)) is None:
            return self.store.values(name, start, stop)
        if part == "status":
            return self._status[owner][start:stop]
        return (
            column.read_scale(start, stop) if part == "scale" else column.read_stored(start, stop)
        )


def complete_columns(store: FeatureStore) -> list[Column]:
    """Return all columns of a store.

    Raises:
        StoreError: One has chunks that are not done.
    """
    columns = [store.column(name) for name in store.columns()]
    for column in columns:
        if pending := column.pending():
            raise StoreError(
                f"{column.path} has {len(pending)} chunks that are not done. A complete column was "
                f"expected. Finish it with `sail extract`."
            )
    return columns


def write_store(
    out: Place,
    rows: Rows,
    stop: StopRequest,
    *,
    origin: object,
    rows_per_chunk: int | None = None,
    rows_at_once: int | None = None,
) -> Place:
    """Make a store: it appears when all of it is there, and goes on where it was stopped.

    Args:
        out: Where it goes, also under a URL; there must be none.
        rows: All that it will hold.
        stop: Asked before every read.
        origin: What they come from, for messages.
        rows_per_chunk: Of the store; as the layout of the rows says if not given.
        rows_at_once: How many rows are read at once; as many as a chunk that is read has if not
            given, because to read it for each chunk that is made would be to read it often.

    Raises:
        StoreError: There is something at `out`.
        LockedError: Another process is at it.
        SourceError: Two rows have one key, or the keys are not those that the layout tells.
        Stopped: A signal came.
    """
    check_free(out)
    check_writable(out)
    layout = rows.layout.with_rows_per_chunk(rows_per_chunk or rows.layout.rows_per_chunk)
    chunks = range(-(-layout.rows // layout.rows_per_chunk))
    with (
        unfinished(out, FORMAT_VERSION, layout.to_json(), rows.stamp) as work,
        ProgressLine(out.name, None, "chunks") as line,
    ):
        writer = _Writer(work.made, layout, done=work.done)
        line.set(work.done, len(chunks))
        left = chunks[work.done :]
        at_once = rows_at_once or rows.layout.rows_per_chunk
        blocks = chunks_of(rows, layout.rows_per_chunk, stop, left, at_once)
        for chunk, block in zip(left, blocks, strict=True):
            writer.write(chunk, block)
            work.advance(*writer.files(chunk))
            line.advance(1)
        writer.finish(origin)
        publish(work.made, out)
    return out


class FolderPart(Protocol):
    """Files of a folder with the same rows, as they are written."""

    @property
    def files(self) -> Sequence[Path]:
        """Which they are."""

    def write(self, block: Block) -> None:
        """Write the next rows."""


PartOpener = Callable[[Path, int, range], AbstractContextManager[FolderPart]]
"""Begins a part: of a folder, its number among all, and the rows that it will have."""


def write_parts(
    rows: Rows, out: Path, form: str, rows_per_part: int, stop: StopRequest, begin: PartOpener
) -> Path:
    """Write the rows of a store as a folder of parts, as `pipeline.stores` says.

    Args:
        rows: Of a store.
        out: The folder.
        form: What it is, to go on with nothing else.
        rows_per_part: Rounded down to whole chunks, at least one.
        stop: Asked before every chunk.
        begin: Begins a part.
    """
    check_free(out)
    layout, size = rows.layout, rows.layout.rows_per_chunk
    chunks = range(-(-layout.rows // size))
    per_part = max(1, rows_per_part // size)
    with (
        unfinished(out, form, per_part, layout.to_json(), rows.stamp) as work,
        ProgressLine(out.name, None, "chunks") as line,
    ):
        work.made.mkdir(exist_ok=True)
        line.set(work.done * per_part, len(chunks))
        for first in chunks[::per_part][work.done :]:
            inside = chunks[first : first + per_part]
            covered = range(first * size, min(inside.stop * size, layout.rows))
            with begin(work.made, first // per_part, covered) as part:
                for block in chunks_of(rows, size, stop, inside):
                    part.write(block)
                    line.advance(1)
            work.advance(*part.files)
        work.publish(out)
    return out


class _Writer:
    def __init__(self, folder: Path, layout: Layout, *, done: int) -> None:
        self._folder, self._layout = folder, layout
        self._group = zarr.open_group(folder, mode="r+") if done else _create(folder, layout)
        self._columns = [Column(folder, name, keys=self._key_files) for name in layout.columns]
        self._keys = KeyCheck(layout.rows)
        for chunk in range(done):
            self._keys.add(self._written_keys(chunk))

    def write(self, chunk: int, block: Block) -> None:
        self._keys.add(block["key"])
        rows = {name: block[name] for name in self._layout.names}
        write_block(self._group, rows, self._rows(chunk).start)
        for column in self._columns:
            features, status = (block[f"{column.name}/{each}"] for each in ("features", "status"))
            column.write_stored(chunk, features, status, block.get(f"{column.name}/scale"))

    def files(self, chunk: int) -> list[Path]:
        """Return what is not on the disk for sure: what zarr wrote, and the names of the status.

        Where every value is the empty one, zarr writes no file.
        """
        names = (*self._layout.names, KEY_HASH)
        places = [self._folder / name / "c" / str(chunk) for name in names]
        places += [Path(str(column.status_file(chunk))) for column in self._columns]
        return [place for place in places if place.is_file()]

    def finish(self, origin: object) -> None:
        if repeated := self._keys.repeated():
            first, again = repeated[0]
            size = self._layout.rows_per_chunk
            key = str(self._written_keys(first // size)[first % size])
            raise SourceError(
                f"Of {origin} rows {first} and {again} both have the key {key!r}. Unique keys "
                f"were expected. Take them from elsewhere (`--take key=…`), or let stores that are "
                f"merged have `--prefix`."
            )
        if self._layout.keys_sha256 not in (None, self._keys.sha256):
            raise SourceError(
                f"{origin} has keys of sha256 {self._keys.sha256}, but says "
                f"{self._layout.keys_sha256}. The keys that were written were expected. Write it "
                f"again."
            )
        root = read_metadata(self._folder / METADATA, "group")
        root["attributes"]["keys_sha256"] = self._keys.sha256
        write(self._folder / METADATA, json.dumps(root, indent=2).encode())
        chunks = -(-self._layout.rows // self._layout.rows_per_chunk)
        write_store_manifest(self._folder, [*self._layout.names, KEY_HASH], chunks)
        for column in self._columns:
            if unusable := int((column.status() != Status.OK).sum()):
                logger.warning("%s: %d rows quarantined", column.name, unusable)

    def _written_keys(self, chunk: int) -> np.ndarray:
        layout, rows = self._layout, self._rows(chunk)
        keys = RowArray(self._folder, "key", layout.rows, layout.rows_per_chunk, None)
        return keys.read(rows.start, rows.stop)

    def _key_files(self, chunk: int) -> list[int]:
        file = self._folder / "key" / "c" / str(chunk)
        return [zlib.crc32(file.read_bytes())]

    def _rows(self, chunk: int) -> slice:
        size = self._layout.rows_per_chunk
        return slice(chunk * size, min((chunk + 1) * size, self._layout.rows))


def _create(folder: Path, layout: Layout) -> zarr.Group:
    rows, size = layout.rows, layout.rows_per_chunk
    facts = {
        "rows": rows,
        "rows_per_chunk": size,
        "keys_sha256": "",
        "source": dict(layout.source),
    }
    group = create_group(folder, layout.names, facts, layout.class_names)
    for encoder, fingerprint in layout.fingerprints.items():
        group.require_group(encoder).attrs.update(dict(fingerprint))
    for name, dim in layout.columns.items():
        dtype = "int8" if name in layout.scaled else "float16"
        arrays = create_column(group.require_group(name), rows, dim, size, dtype=dtype)
        write_manifest(folder, describe_column(folder, name, arrays), name)
    return group


class KeyCheck:
    """Digest of the keys of a store, and which are not unique, in 8 bytes a row."""

    def __init__(self, rows: int) -> None:
        self._digest = hashlib.sha256()
        self._short: UInt64[np.ndarray, rows] = np.empty(rows, dtype=np.uint64)
        self._rows = 0

    def add(self, keys: np.ndarray) -> None:
        """Take the keys of the next rows."""
        every = keys.tolist()
        self._digest.update("".join(f"{key}\n" for key in every).encode())
        self._short[self._rows : self._rows + len(every)] = key_hashes(every, len(every))
        self._rows += len(every)

    @property
    def sha256(self) -> str:
        """Of the keys so far, each ended by a newline."""
        return self._digest.hexdigest()

    def repeated(self) -> list[tuple[int, int]]:
        """Return each row whose key a row before it has, behind that row, in order."""
        order = np.argsort(self._short, kind="stable")
        same = np.flatnonzero(self._short[order[1:]] == self._short[order[:-1]])
        pairs = zip(order[same].tolist(), order[same + 1].tolist(), strict=True)
        return sorted(pairs, key=lambda pair: pair[1])
