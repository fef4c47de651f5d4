"""`sail subset`: some rows of a store, written as a store of their own."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from features.device.cuda import CPU, first_gpu
from features.errors import ConfigError, SourceError, StoreError
from features.status import Status
from features.storage.column import Column
from features.storage.place import Place
from features.storage.reading import Expected, read_text
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.stores.merge import ChosenRows, origin_of
from pipeline.stores.resumable import check_free
from pipeline.stores.writer import StoreRows, write_store

ROUNDING = 1e-6  # a vector's cosine with itself may be this much below 1


def first_of_alike(
    column: Column, among: Bool[np.ndarray, "rows"], cosine: float, stop: StopRequest
) -> Bool[np.ndarray, "rows"]:
    """Return which rows stay when a row goes that is like one that stays before it.

    Every row is compared with all that stay before it, block by block, on the GPU where there is
    one: the time grows with the square of the rows, the memory does not grow. Rows that are not ok
    have no features and stay.

    Args:
        column: Whose features are compared.
        among: Rows that come into question; all others go.
        cosine: From which cosine on two rows are alike.
        stop: Asked before every block.

    Raises:
        Stopped: A signal came.
    """
    device = first_gpu() or CPU
    stays = among.copy()
    rows = np.flatnonzero(among & np.isin(np.arange(column.rows), column.ok_rows()))
    size = column.rows_per_chunk
    chunks = [rows[rows // size == chunk] for chunk in np.unique(rows // size)]
    with ProgressLine(f"alike in {column.name}", len(chunks), "chunks") as line:
        for number, chunk in enumerate(chunks):
            stop.check()
            features = _directions(column, chunk, device)
            is_alike = torch.zeros(len(chunk), dtype=torch.bool, device=device)
            for before in chunks[:number]:
                if len(kept := before[stays[before]]):
                    others = _directions(column, kept, device)
                    is_alike |= (features @ others.T).amax(1) >= cosine - ROUNDING
            stays[chunk] = ~_with_alike_within(features, is_alike, cosine)
            line.advance(1)
    return stays


def _directions(
    column: Column, rows: Int64[np.ndarray, "rows"], device: torch.device
) -> Float[Tensor, "rows dim"]:
    features = column.rows_at(rows)
    return F.normalize(torch.from_numpy(features).to(device).float(), dim=-1)


def _with_alike_within(
    features: Float[Tensor, "rows dim"], is_alike: Bool[Tensor, "rows"], cosine: float
) -> Bool[np.ndarray, "rows"]:
    """Add rows that are like one of the same block that stays before them."""
    alike = torch.tril(features @ features.T >= cosine - ROUNDING, -1).cpu().numpy()
    goes: np.ndarray = is_alike.cpu().numpy()
    for row in np.flatnonzero(alike.any(axis=1)):
        goes[row] |= bool((alike[row] & ~goes).any())
    return goes


QUERY = re.compile(r"(?P<name>[^=~]+)(?P<sign>[=~])(?P<value>.*)", re.DOTALL)
STATUS = {status.label: status for status in Status}


def matches(store: FeatureStore, query: str) -> Bool[np.ndarray, "rows"]:
    """Return for each row whether a condition holds.

    Args:
        store: Whose rows.
        query: `NAME=VALUE` or, of texts, `NAME~PART`, which takes no notice of case. NAME is `key`,
            `caption/<field>`, `label` (VALUE is a class name or a number), `group`, or a column
            (VALUE is a status in words, such as `ok`).

    Raises:
        ConfigError: It is of no such form, or names nothing that the store has.
    """
    if (found := QUERY.fullmatch(query)) is None:
        raise _wrong(query, store, "it has neither = nor ~")
    name, sign, value = found["name"].strip(), found["sign"], found["value"].strip()
    if name == "key" or name in [f"caption/{field}" for field in store.fields]:
        return _of_texts(store, name, value, is_whole=sign == "=")
    if sign == "~":
        raise _wrong(query, store, f"{name!r} is no text")
    if name in store.columns():
        if value not in STATUS:
            raise _wrong(query, store, f"{value!r} is no status ({', '.join(STATUS)})")
        return np.asarray(store.column(name).status() == STATUS[value])
    return _of_numbers(store, name, value, query)


def _of_numbers(store: FeatureStore, name: str, value: str, query: str) -> Bool[np.ndarray, "rows"]:
    numbers = {"label": store.labels, "group": store.groups}.get(name, lambda: None)()
    if numbers is None:
        raise _wrong(query, store, f"it has no {name!r}")
    names = store.class_names or ()
    if name == "label" and value in names:
        return np.asarray(numbers == names.index(value))
    if not re.fullmatch(r"-?\d+", value):
        raise _wrong(query, store, f"{value!r} is neither a class name nor a number")
    return np.asarray(numbers == int(value))


def _of_texts(
    store: FeatureStore, name: str, value: str, *, is_whole: bool
) -> Bool[np.ndarray, "rows"]:
    part = value.casefold()
    holds: Callable[[str], bool] = (
        (lambda text: text == value) if is_whole else (lambda text: part in text.casefold())
    )
    mask = np.empty(store.rows, dtype=bool)
    for start in range(0, store.rows, store.rows_per_chunk):
        stop = min(start + store.rows_per_chunk, store.rows)
        texts = (
            store.keys(start, stop)
            if name == "key"
            else store.captions(name.removeprefix("caption/"), start, stop)
        )
        mask[start:stop] = [holds(text) for text in texts.tolist()]
    return mask


def _wrong(query: str, store: FeatureStore, why: str) -> ConfigError:
    names = ["key", *(f"caption/{field}" for field in store.fields), "label", "group"]
    return ConfigError(
        f"The query {query!r} cannot be asked of {store.path}: {why}. NAME=VALUE or NAME~PART was "
        f"expected, where NAME is one of {', '.join([*names, *store.columns()])}. Correct --query."
    )


@dataclass(frozen=True)
class Choice:
    """Which rows; each narrows what those before left, in this order."""

    keys: Path | None = None
    """A text file with a key a line."""
    queries: tuple[str, ...] = ()
    """All must hold; see `matches`."""
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
    expected = Expected("A text file in UTF-8 with one key a line", "Correct --keys.", SourceError)
    wanted = {line.strip() for line in read_text(file, expected).split("\n")} - {""}
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
