"""Which chunk a file is: a record for each chunk of a column, written between features and status.

A checksum tells that a file is whole, not that it is the one of this place. A record holds the
checksums of the chunk's files, of what places it (column, number, keys and encoder), and of the
images that it was made of.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from features.errors import StoreCorruptError
from features.storage.chunks import NOT_THIS, read_chunk, write_chunk
from features.storage.place import Place

WORDS = 5
"""Numbers of a record."""
Keys = Callable[[int], Sequence[int]]
"""Returns the crc32 that the file of the keys of a chunk may have: two while the store grows."""


class Identity(NamedTuple):
    """What is recorded of a chunk: a crc32c each, uint32."""

    features: int
    scale: int
    """0 where the features are float16."""
    status: int
    place: int
    images: int
    """Of the encoded images of its rows, in order; 0 where that is not known, and of captions."""


class Identities:
    """The records of a column."""

    def __init__(self, column: Place, name: str, keys: Keys, encoders: Sequence[str]) -> None:
        """Open them.

        Args:
            column: Where the column is.
            name: `image/<encoder>` or `text/<encoder>/<field>`.
            keys: Of the store.
            encoders: Digests that the metadata of the encoder may have.
        """
        self._column = column
        self._name = name
        self._keys = keys
        self._encoders = encoders
        self._known: dict[int, Identity] = {}

    def file(self, chunk: int) -> Place:
        """Path of the record of a chunk: 5 uint32 and 4 bytes of crc32c."""
        return self._column / "identity" / "c" / str(chunk) / "0"

    def of(self, chunk: int) -> Identity:
        """Return the record of a chunk.

        Raises:
            StoreCorruptError: It is missing, damaged, or of another chunk.
        """
        if chunk not in self._known:
            words = np.empty(WORDS, dtype="<u4")
            read_chunk(self.file(chunk), words, verify=True)
            record = Identity(*words.tolist())
            if record.place not in self._places(chunk):
                what = "it is of another chunk, of other keys, or of another encoder"
                raise StoreCorruptError(self.file(chunk), what)
            self._known[chunk] = record
        return self._known[chunk]

    def check(self, chunk: int, part: str, crc32c: int, file: Place) -> None:
        """Refuse a file of a chunk that is not the one that was written.

        Args:
            chunk: Its number.
            part: `features`, `scale` or `status`.
            crc32c: In the file.
            file: Where it is.

        Raises:
            StoreCorruptError: It is another one, or the record cannot be read.
        """
        if getattr(self.of(chunk), part) != crc32c:
            self._known.pop(chunk)  # another process may have written both anew
            if getattr(self.of(chunk), part) != crc32c:
                raise StoreCorruptError(file, NOT_THIS)

    def write(self, chunk: int, *, features: int, scale: int, status: int, images: int = 0) -> None:
        """Write the record of a chunk."""
        record = Identity(features, scale, status, self._places(chunk)[-1], images)
        beside = self._column / "identity" / str(chunk)
        write_chunk(self.file(chunk), np.array(record, dtype="<u4"), beside=beside)
        self._known[chunk] = record

    def _places(self, chunk: int) -> list[int]:
        return [
            google_crc32c.value(f"{self._name}\n{chunk}\n{keys}\n{encoder}".encode())
            for encoder in self._encoders
            for keys in self._keys(chunk)
        ]
