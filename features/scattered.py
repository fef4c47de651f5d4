"""Reads the rows of a chunk straight to places of their own, in one pass over the memory."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from features.chunks import CRC_BYTES


def scatter_rows(
    path: Path,
    rows: Shaped[np.ndarray, "all_rows dim"],
    places: Int64[np.ndarray, "chunk_rows"],
) -> bool:
    """Read each row of a chunk to a place of its own, by preadv(2). The crc32c is not looked at.

    Python's `os.preadv` would want an object for every row; here the system is given the addresses
    as an array.

    Args:
        path: On local disk.
        rows: C-contiguous; where they go.
        places: Of the rows of the chunk, in `rows`.

    Returns:
        Whether they are there. If not (the system has no such call, or the file is missing or cut
        off), the places hold anything, and `features.chunks.read_pieces` reads it or says why not.

    Raises:
        IndexError: A place is not in `rows`.
        ValueError: `rows` cannot be written to by address.
    """
    if PREADV is None:
        return False
    if places.min() < 0 or places.max() >= len(rows):
        raise IndexError(f"places {places.min()} to {places.max()} are not all in {len(rows)} rows")
    if not (rows.flags.c_contiguous and rows.flags.writeable):
        raise ValueError("rows are not C-contiguous and writeable")
    size = rows[0].nbytes
    targets = np.empty((len(places), 2), dtype=np.uintp)  # struct iovec: address, bytes
    targets[:, 0] = rows.ctypes.data + places * size
    targets[:, 1] = size
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        is_whole = os.fstat(file).st_size == len(places) * size + CRC_BYTES
        return is_whole and _read(file, targets, size)
    finally:
        os.close(file)


def _read(file: int, targets: Shaped[np.ndarray, "chunk_rows 2"], size: int) -> bool:
    for first in range(0, len(targets), IOV_MAX):
        some = targets[first : first + IOV_MAX]
        if PREADV(file, some.ctypes.data, len(some), first * size) != len(some) * size:
            return False
    return True


def _preadv() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).preadv
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    function.restype = ctypes.c_ssize_t
    return function


PREADV = _preadv()  # with a pointer's 64 bits: int64 is its off_t
IOV_MAX = 1024  # the most that Linux takes at once
