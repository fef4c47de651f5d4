"""`sail subset`: some rows of a store, written as a store of their own."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from features.errors import SourceError, StoreError
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.formats.store import StoreRows, write_store
from pipeline.formats.unfinished import check_free
from pipeline.interrupt import StopRequest
from pipeline.rewrite.chosen import ChosenRows
from pipeline.rewrite.duplicates import first_of_alike
from pipeline.rewrite.merge import origin_of
from pipeline.rewrite.query import matches


@dataclass(frozen=True)
class Choice:
    """Which rows; each narrows what those before left, in this order."""

    keys: Path | None = None
    """A text file with a key a line."""
    queries: tuple[str, ...] = ()
    """All must hold; see `pipeline.rewrite.query`."""
    deduplicate: float | None = None
    """Of rows at least this alike by cosine, the first alone."""
    column: str | None = None
    """In which column; the first if not given."""
    random: int | None = None
    """So many of what is left, by chance."""
    seed: int = 0


def subset_store(path: Place, out: Place, choice: Choice, stop: StopRequest) -> Place:
    """Write the rows that are chosen, in their order, as a store; it goes on where it was stopped.

    Args:
        path: The store; every chunk of its columns must be done.
        out: Where the new one goes; there must be none.
        choice: Which rows.
        stop: Asked before every read.

    Raises:
        SourceError: A key of the file is not in the store.
        ConfigError: A query cannot be understood.
        StoreError: No row is left, the store is not whole, or there is something at `out`.
        Stopped: A signal came.
    """
    check_free(out)
    store = FeatureStore.open(path)
    rows = StoreRows(store, restored=False)
    mask = _chosen(store, choice, stop)
    if not mask.any():
        raise StoreError(
            f"None of the {store.rows} rows of {path} is left. At least one was expected. Choose "
            f"otherwise."
        )
    said = {name: value for name, value in asdict(choice).items() if value not in (None, ())}
    source = {
        "kind": "subset",
        "path": str(path),
        "chosen": {name: str(value) if name == "keys" else value for name, value in said.items()},
        "of": origin_of(store),
    }
    numbers = np.flatnonzero(mask)
    layout = replace(rows.layout, rows=len(numbers), source=source, keys_sha256=None)
    return write_store(out, ChosenRows(rows, numbers, layout, stop), stop, origin=path)


def _chosen(store: FeatureStore, choice: Choice, stop: StopRequest) -> Bool[np.ndarray, "rows"]:
    mask = np.ones(store.rows, dtype=bool)
    if choice.keys is not None:
        mask &= _with_keys(store, choice.keys)
    for query in choice.queries:
        mask &= matches(store, query)
    if choice.deduplicate is not None:
        column = store.column(choice.column or store.columns()[0])
        mask &= first_of_alike(column, mask, choice.deduplicate, stop)
    if choice.random is not None:
        left = np.flatnonzero(mask)
        generator = np.random.default_rng(choice.seed)
        drawn = generator.choice(left, min(choice.random, len(left)), replace=False)
        mask = np.zeros(store.rows, dtype=bool)
        mask[drawn] = True
    return mask


def _with_keys(store: FeatureStore, file: Path) -> Bool[np.ndarray, "rows"]:
    """Find the rows of keys, all of which must be there."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} cannot be read: {error}. A text file in UTF-8 with one key a line was "
            f"expected. Correct --keys."
        ) from error
    wanted = {line.strip() for line in lines} - {""}
    mask = np.zeros(store.rows, dtype=bool)
    for start in range(0, store.rows, store.rows_per_chunk):
        keys = store.keys(start, start + store.rows_per_chunk).tolist()
        mask[start : start + len(keys)] = [key in wanted for key in keys]
        wanted.difference_update(keys)
    if wanted:
        raise SourceError(
            f"{store.path} has no row with the key {min(wanted)!r}, and {len(wanted) - 1} more of "
            f"{file}. Keys of the store were expected. Correct the file."
        )
    return mask
