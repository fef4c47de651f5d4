"""Which rows of a store a number of results.json was counted over."""

import hashlib

import numpy as np
from jaxtyping import Int64

from evaluate.measures.compositional import pair_rows
from evaluate.results import Result
from features.store import FeatureStore
from pipeline.explore.session import Session

BY_LABEL = ("zero_shot", "knn/", "linear_probe/")


def rows_behind(session: Session, result: Result) -> Int64[np.ndarray, "items each"] | None:
    """Return the rows of each item of a number, in the order of its items.

    They are chosen as the measure chose them, and are those if their hash is the one that the
    number came with.

    Returns:
        One row of each item, or the two of a group; None where it cannot be told for sure.
    """
    if result.task == "segmentation":  # of pictures that are in no store
        return None
    store = session.store(result.split)
    if f"image/{result.encoders['image']}" not in store.columns():
        return None
    rows = _chosen(session, store, result)
    digest = hashlib.sha256(store.keys_sha256.encode())
    digest.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
    return rows if digest.hexdigest() == result.protocol.get("rows_sha256") else None


def _chosen(
    session: Session, store: FeatureStore, result: Result
) -> Int64[np.ndarray, "items each"]:
    rows = store.column(f"image/{result.encoders['image']}").ok_rows()
    if result.task.startswith(BY_LABEL):
        labels = session.labels(store)
        return rows[:, None] if labels is None else rows[labels[rows] >= 0][:, None]
    if result.task.startswith("retrieval/"):
        return rows[np.isin(rows, np.concatenate(_captioned(store, result)))][:, None]
    if result.task == "compositional":
        return _grouped(store, result, rows)
    return rows[:, None]


def _grouped(
    store: FeatureStore, result: Result, rows: Int64[np.ndarray, "ok"]
) -> Int64[np.ndarray, "items each"]:
    """Return both rows of each group, or its only one."""
    groups = store.groups()
    if groups is None:
        return np.empty((0, 1), dtype=np.int64)
    for captioned in _captioned(store, result):
        rows = np.intersect1d(rows, captioned)
    if not isinstance(result.protocol["captions"], str):
        alone: np.ndarray = rows[groups[rows] >= 0]
        return alone[:, None]
    usable = np.zeros(store.rows, dtype=bool)
    usable[rows] = True
    pairs: np.ndarray = pair_rows(groups, usable)[0]
    return pairs


def _captioned(store: FeatureStore, result: Result) -> list[Int64[np.ndarray, "ok"]]:
    """Return the rows whose caption can be used, of each field of a number."""
    named = result.protocol["captions"]
    fields = [named] if isinstance(named, str) else named
    return [store.column(f"text/{result.encoders['text']}/{field}").ok_rows() for field in fields]
