"""Several columns of a store read side by side as one: `align.image = ["cls", "mean"]`."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float16, UInt8

from features.status import Status
from features.storage.column import Column
from features.storage.fingerprint import Fingerprint
from features.storage.place import Place

BESIDE = "+"
"""Between the names of columns that are read side by side; no name has it."""


class JoinedColumn(Column):
    """Columns under one name, such as `image/cls+mean`: a row has their features side by side.

    Its fingerprint has that of each of its parts, by the part's name. It cannot be written, and has
    no chunks of its own: the loader reads those of its parts.
    """

    def __init__(self, store: Place, columns: Sequence[Column]) -> None:
        """Join columns of a store, which all have the same chunks."""
        first = columns[0]
        names = [column.name.split("/") for column in columns]
        joined = [names[0][0], BESIDE.join(name[1] for name in names), *names[0][2:]]
        self._parts = tuple(columns)
        self.name = "/".join(joined)
        self.path = store / self.name  # in messages, which are mostly of its parts
        self.is_remote = any(column.is_remote for column in columns)
        self.dtype = np.dtype(np.float16)
        self.dim = sum(column.dim for column in columns)
        self.rows, self.rows_per_chunk = first.rows, first.rows_per_chunk
        self.fingerprint = Fingerprint(
            {name[1]: dict(column.fingerprint) for name, column in zip(names, columns, strict=True)}
        )
        self.identities = None

    @property
    def parts(self) -> Sequence[Column]:
        """The columns, in their order."""
        return self._parts

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of a row in the store, with their factors."""
        return sum(part.row_bytes for part in self._parts)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the files of a chunk of every part."""
        return sum(part.chunk_bytes for part in self._parts)

    @property
    def is_scaled(self) -> bool:
        """Whether some of the features are whole numbers in the store."""
        return any(part.is_scaled for part in self._parts)

    def pending(self, among: Iterable[int] | None = None) -> list[int]:
        """Return the chunks that are not done in one of the parts, in order."""
        chosen = None if among is None else list(among)
        return sorted({chunk for part in self._parts for chunk in part.pending(chosen)})

    def status(self) -> UInt8[np.ndarray, "rows"]:
        """Return the status of every row: that of the first part in which it is not ok."""
        return self._worst([part.status() for part in self._parts])

    def chunk_status(self, chunk: int) -> UInt8[np.ndarray, "rows"]:
        """Return the same of the rows of a chunk that is done."""
        return self._worst([part.chunk_status(chunk) for part in self._parts])

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "batch dim"]:
        """Return rows `start` to `stop`; zeros where a row is pending or quarantined."""
        return np.concatenate([part.read(start, stop) for part in self._parts], axis=1)

    def checksum(self) -> str:
        """Return a sha256 over the checksums of all parts."""
        every = "".join(part.checksum() for part in self._parts)
        return hashlib.sha256(every.encode()).hexdigest()

    @staticmethod
    def _worst(codes: Sequence[UInt8[np.ndarray, "rows"]]) -> UInt8[np.ndarray, "rows"]:
        found = codes[0].copy()
        for each in codes[1:]:
            np.copyto(found, each, where=found == Status.OK)
        return found
