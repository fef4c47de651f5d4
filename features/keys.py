"""Keys by the 8 bytes of a hash, so that those of all rows of any store fit in memory."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from features.store import FeatureStore

HASH_BYTES = 8
CHUNKS_AT_ONCE = 16  # under a URL they are fetched side by side


def key_hashes(keys: Iterable[str], count: int) -> UInt64[np.ndarray, "rows"]:
    """Return the first 8 bytes of the blake2b of each string as an unsigned number."""
    blake2b = hashlib.blake2b
    joined = b"".join(blake2b(str(key).encode(), digest_size=HASH_BYTES).digest() for key in keys)
    hashes = np.frombuffer(joined, dtype="<u8")
    if len(hashes) != count:
        raise ValueError(f"Got {len(hashes)} keys where {count} were said to come.")
    return hashes


def store_key_hashes(store: FeatureStore) -> UInt64[np.ndarray, "rows"]:
    """Return `key_hashes` of all rows of a store."""
    size = CHUNKS_AT_ONCE * store.rows_per_chunk
    hashes = np.empty(store.rows, dtype=np.uint64)
    for start in range(0, store.rows, size):
        keys = store.keys(start, start + size).tolist()
        hashes[start : start + len(keys)] = key_hashes(keys, len(keys))
    return hashes


def rows_by_key(
    hashes: UInt64[np.ndarray, "rows"], wanted: UInt64[np.ndarray, "others"]
) -> tuple[Int64[np.ndarray, "others"], Bool[np.ndarray, "others"]]:
    """Find rows by their keys.

    Args:
        hashes: Of the keys of all rows.
        wanted: Of keys.

    Returns:
        The row of each wanted key, and whether there is one; if not, the row is any.
    """
    if not len(hashes):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    order = np.argsort(hashes, kind="stable")
    places = np.searchsorted(hashes, wanted, sorter=order)
    rows = order[np.minimum(places, len(order) - 1)]
    return rows, hashes[rows] == wanted
