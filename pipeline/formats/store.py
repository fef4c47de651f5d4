"""A feature store as rows, and the one writer that makes a store of any rows."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import UInt64

from features.column import Column, create_column
from features.errors import SourceError, StoreCorruptError, StoreError
from features.publish import new_group
from features.quantisation import dequantise
from features.storage.files import zarr_store
from features.storage.place import Place
from features.store import FORMAT, FORMAT_VERSION, NUMBERS, FeatureStore
from pipeline.formats.rows import STRINGS, Block, Layout, encoder_of, in_chunks, num_rows
from pipeline.progress import ProgressLine


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
        self._group = zarr.open_group(zarr_store(store.path), mode="r", zarr_format=3)

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`.

        Raises:
            StoreCorruptError: A chunk of theirs is damaged or missing.
        """
        block = {name: self._read(name, start, stop) for name in self.layout.array_names}
        for column in self._restored:
            scale = self._read(f"{column}/scale", start, stop)
            block[f"{column}/features"] = dequantise(block[f"{column}/features"], scale)
        return block

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        try:
            return np.asarray(self._group[name][start:stop])  # type: ignore[index]
        except ValueError as error:  # so zarr calls a checksum that does not fit
            where = f"{self.store.path / name}, rows {start} to {stop - 1},"
            raise StoreCorruptError(where, str(error)) from error


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


def check_free(out: Place) -> None:
    """Refuse a place for a new store at which there is something.

    Raises:
        StoreError: There is.
    """
    if FeatureStore.is_at(out):
        raise StoreError(
            f"There is something at {out}. A place without a store was expected. Give another "
            f"--out, or delete it."
        )


def write_store(out: Place, layout: Layout, blocks: Iterable[Block], *, origin: object) -> Place:
    """Make a store: all of it, or nothing.

    Args:
        out: Where it goes, also under a URL; there must be none.
        layout: What it says of itself.
        blocks: All its rows, in order, in blocks of any sizes.
        origin: What they come from, for messages.

    Raises:
        StoreError: There is something at `out`.
        SourceError: Two rows have one key, or the keys are not those that the layout tells.
    """
    check_free(out)
    size = layout.rows_per_chunk
    with (
        new_group(out, store=out) as folder,
        ProgressLine(out.name, -(-layout.rows // size), "chunks") as line,
    ):
        group = _create(folder, layout)
        columns = [Column(folder, name) for name in layout.columns]
        keys, rows = _Keys(layout.rows), 0
        for chunk, block in enumerate(in_chunks(blocks, size)):
            keys.add(block["key"])
            part = slice(rows, rows + num_rows(block))
            for name in layout.names:
                group[name][part] = block[name]  # type: ignore[index]
            for column in columns:
                features, status = (
                    block[f"{column.name}/{each}"] for each in ("features", "status")
                )
                column.write_stored(chunk, features, status, block.get(f"{column.name}/scale"))
            rows = part.stop
            line.advance(1)
        if rows != layout.rows:
            raise ValueError(f"{rows} rows came for {out}, which was to have {layout.rows}")
        if same := keys.first_same():
            key = str(group["key"][same[0]])  # type: ignore[index]
            raise SourceError(
                f"Of {origin} rows {same[0]} and {same[1]} both have the key {key!r}. Unique keys "
                f"were expected. Take them from elsewhere (`--take key=…`), or let stores that are "
                f"merged have `--prefix`."
            )
        if layout.keys_sha256 not in (None, keys.sha256):
            raise SourceError(
                f"{origin} has keys of sha256 {keys.sha256}, but says {layout.keys_sha256}. The "
                f"keys that were written were expected. Write it again."
            )
        group.attrs["keys_sha256"] = keys.sha256
    return out


def _create(folder: Path, layout: Layout) -> zarr.Group:
    """Make the empty arrays of a store."""
    rows, size = layout.rows, layout.rows_per_chunk
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rows": rows,
        "rows_per_chunk": size,
        "keys_sha256": "",
        "source": dict(layout.source),
    }
    group = zarr.create_group(folder, attributes=attributes)
    for name in layout.names:
        is_number = name in NUMBERS
        names = layout.class_names if name == "label" else None
        group.create_array(
            name,
            shape=(rows,),
            chunks=(size,),
            dtype="int32" if is_number else STRINGS,
            fill_value=-1 if is_number else "",
            dimension_names=["row"],
            attributes={"class_names": list(names)} if names else {},
        )
    for kind in ("image", "text"):
        group.require_group(kind)
    for encoder, fingerprint in layout.fingerprints.items():
        group.require_group(encoder).attrs.update(dict(fingerprint))
    for name, dim in layout.columns.items():
        dtype = "int8" if name in layout.scaled else "float16"
        create_column(group.require_group(name), rows, dim, size, dtype=dtype)
    return group


class _Keys:
    """Sees to it that keys are unique, in 8 bytes a row."""

    def __init__(self, rows: int) -> None:
        self._digest = hashlib.sha256()
        self._short: UInt64[np.ndarray, rows] = np.empty(rows, dtype=np.uint64)
        self._rows = 0

    def add(self, keys: np.ndarray) -> None:
        """Take the keys of the next rows."""
        every = keys.tolist()
        self._digest.update("".join(f"{key}\n" for key in every).encode())
        hashes = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in every)
        self._short[self._rows : self._rows + len(every)] = np.frombuffer(hashes, dtype=np.uint64)
        self._rows += len(every)

    @property
    def sha256(self) -> str:
        """Of the keys so far, each ended by a newline."""
        return self._digest.hexdigest()

    def first_same(self) -> tuple[int, int] | None:
        """Return two rows that have one key, if there are any."""
        order = np.argsort(self._short, kind="stable")
        same = np.flatnonzero(self._short[order[1:]] == self._short[order[:-1]])
        return (int(order[same[0]]), int(order[same[0] + 1])) if len(same) else None
