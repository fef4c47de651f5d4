"""Conditions on the rows of a store: `label=cat`, `caption/long~red circle`, `image/dino=ok`."""

import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from features.errors import ConfigError
from features.status import Status
from features.store import FeatureStore

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
