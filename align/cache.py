"""Chunks of remote stores, kept on local disk after they were read once."""

import hashlib
import json
import logging
import threading
from pathlib import Path

import numpy as np

from align.selection import Columns
from features.chunks import CRC_BYTES, read_chunk, write_chunk
from features.column import Column
from features.errors import StoreCorruptError
from features.partial import remove_leftovers

logger = logging.getLogger(__name__)


class ChunkCache:
    """A folder of chunks, bounded in bytes.

    Chunks are added until the folder is full and none is removed: every epoch reads all chunks in
    another order, and then no rule of removal finds more of them here than this one.
    """

    def __init__(self, folder: Path, max_bytes: int, *, processes: int = 1) -> None:
        """Count what is there already.

        Args:
            folder: Of this cache; it may hold chunks of several stores.
            max_bytes: Of all files in it.
            processes: Each of so many adds its share of what is left.
        """
        self._folder = folder
        for of_column in folder.glob("*/"):
            remove_leftovers(of_column)
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self._left = (max_bytes - used) // processes
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}

    def read_into(self, columns: Columns, column: Column, chunk: int, buffer: np.ndarray) -> bool:
        """Fill a buffer with a chunk that is here; return whether it is, and whole."""
        file = self._file(columns, column, chunk)
        if not file.is_file():
            return False
        try:
            read_chunk(file, buffer, verify=True)
        except StoreCorruptError as error:
            logger.warning("%s It is read from the store again.", error)
            file.unlink(missing_ok=True)
            return False
        return True

    def add(self, columns: Columns, column: Column, chunk: int, values: np.ndarray) -> None:
        """Keep a chunk, if there is room; a disk that takes none does not end a training."""
        size = values.nbytes + CRC_BYTES
        with self._lock:
            if size > self._left:
                return
            self._left -= size
        file = self._file(columns, column, chunk)
        try:
            write_chunk(file, values, beside=file)
        except OSError as error:
            self._left = 0
            logger.warning("no more chunks are kept in %s: %s", self._folder, error)

    def _file(self, columns: Columns, column: Column, chunk: int) -> Path:
        """Return where a chunk of these rows and this encoder is; of others it is elsewhere."""
        if column.name not in self._names:
            store = columns.store if column.name.startswith("image") else columns.text_store
            made_of = [str(column.path), store.keys_sha256, store.rows, str(column.dtype)]
            known = json.dumps([*made_of, column.fingerprint], sort_keys=True)
            self._names[column.name] = hashlib.sha256(known.encode()).hexdigest()[:32]
        return self._folder / self._names[column.name] / str(chunk)
