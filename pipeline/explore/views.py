"""The views of results, training and store: the numbers of a run, and the rows behind them."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Float32

from evaluate.confusion import Confusions, confusion_matrix, worst_mistakes
from evaluate.measures import MEASURES, measure_of
from evaluate.nearest import nearest_others
from evaluate.results import Items, Result, read_evaluation, read_items, read_results, rows_sha256
from features.errors import EvaluationError, StoreError
from features.status import Status
from features.storage.column import Column
from pipeline.explore.search import show
from pipeline.explore.session import Session
from pipeline.run.evaluate import read_metrics
from pipeline.stores.inspect import ALIKE

ROWS_OF_A_PAGE = 24
MISTAKES = 12
LIVE_SECONDS = 20
MOST_POINTS = 1500
CHUNKS_LOOKED_AT = 16
BINS = 32
ROWS_COMPARED = 10_000
PAIRS = 24
ROWS_LISTED = 50


def results(session: Session) -> dict[str, Any]:
    """Return every number of `eval/results.json`, and whether it is of the head there is now.

    Raises:
        EvaluationError: The run was not evaluated.
    """
    found, items = _read(session), read_items(session.folder.eval / "items.npz")
    measured = read_evaluation(session.results).checkpoint_sha256
    return {
        "is_current": session.checkpoint_sha256() == measured,
        "measures": [
            {"name": measure.name, "title": measure.title, "words": f"{measure.in_short}."}
            for measure in MEASURES
        ],
        "results": [_told(session, each, items) for each in found],
        "classified": list(_classified(found, items)),
    }


def failures(
    session: Session, name: str, start: int, label: str | None, taken: str | None
) -> dict[str, Any]:
    """Return rows that went wrong, some from a place on, and how many there are.

    Args:
        session: The run.
        name: Of the number, as `results` gives it.
        start: How many of them to leave out.
        label: Only those of a class.
        taken: Only those that were taken for a class; of classification.
    """
    result, items, each = _measured(session, name)
    failed = each[items.hits < items.out_of]
    store, rows = session.store(result.split), failed.ravel()
    if label is not None:
        rows = np.array([row for row in rows.tolist() if session.class_of(store, row) == label])
    predicted = {}
    if items.taken is not None:
        names = store.class_names or ()
        pairs = zip(each[:, 0].tolist(), items.taken.tolist(), strict=True)
        predicted = {row: names[number] for row, number in pairs}
    if taken is not None:
        rows = np.array([row for row in rows.tolist() if predicted.get(row) == taken])
    part = rows[start : start + ROWS_OF_A_PAGE].astype(np.int64).tolist()
    return {
        "split": result.split,
        "of": len(each),
        "failed": len(rows) // failed.shape[1],
        "total": len(rows),
        "rows": [
            asdict(row) | {"taken": predicted.get(row.row)} for row in show(session, store, part)
        ],
    }


def classes(session: Session, split: str) -> dict[str, Any]:
    """Return the accuracy of each class of a split, and which class is taken for which.

    Raises:
        EvaluationError: Its images were not classified, or the store has changed since.
    """
    found, kept = _read(session), read_items(session.folder.eval / "items.npz")
    result, items, each = _measured(session, _classified(found, kept).get(split, split))
    store = session.store(split)
    names, known = store.class_names or (), session.labels(store)
    if known is None or items.taken is None:
        raise _unknown(split)
    labels = known[each[:, 0]].astype(np.int64)
    matrix = confusion_matrix(labels, items.taken.astype(np.int64), len(names))
    confusions = Confusions(split, names, matrix)
    totals, rights = confusions.matrix.sum(axis=1), np.diag(confusions.matrix)
    return {
        "name": result.name,
        "classes": [
            {"name": name, "right": int(rights[i]), "images": int(totals[i])}
            for i, name in enumerate(names)
            if totals[i]
        ],
        "mistakes": [asdict(each) for each in worst_mistakes(confusions, MISTAKES)],
    }


def _told(session: Session, result: Result, items: dict[str, Items]) -> dict[str, Any]:
    """Return a number with what the page says of it."""
    measure = measure_of(result)
    return asdict(result) | {
        "measure": measure.name if measure else None,
        "name": result.name,
        "label": measure.label(result) if measure else f"{result.task} {result.metric}",
        "in_percent": measure.in_percent if measure else True,
        "chance": result.chance,
        "is_detail": result.is_detail,
        "has_rows": result.name in items and _rows(session, result, items[result.name]) is not None,
    }


def _classified(results: Sequence[Result], items: dict[str, Items]) -> dict[str, str]:
    """Return the splits whose images were classified, each with the name of the number of it."""
    return {
        result.dataset: result.name
        for result in results
        if "/" not in result.dataset
        and result.name in items
        and items[result.name].taken is not None
    }


def _rows(session: Session, result: Result, items: Items) -> np.ndarray | None:
    """Return the rows that items are about, None where the store is not as it was measured."""
    if items.rows is None or result.split not in session.config.data:
        return None
    digest = rows_sha256(session.store(result.split).keys_sha256, items.rows)
    return items.rows if digest == result.protocol.get("rows_sha256") else None


def _read(session: Session) -> list[Result]:
    path = session.results
    if not path.is_file():
        raise EvaluationError(
            f"There is no {path}. The results of an evaluation were expected. Run `sail eval`."
        )
    return read_results(path)


def _measured(session: Session, name: str) -> tuple[Result, Items, np.ndarray]:
    """Return a number with its items, and the rows that each is about."""
    items = read_items(session.folder.eval / "items.npz").get(name)
    for result in _read(session) if items else []:
        if result.name == name and items:
            rows = _rows(session, result, items)
            if rows is not None:
                return result, items, rows
    raise _unknown(name)


def _unknown(name: str) -> EvaluationError:
    return EvaluationError(
        f"The rows behind {name!r} are not known. A number of results.json that is counted over "
        f"rows of a store which has not changed since was expected. Run `sail eval` again."
    )


def training_facts(session: Session, seen: int = 0) -> dict[str, Any]:
    """Return the curves of `align/metrics.jsonl`.

    Args:
        session: The run.
        seen: Bytes that the file had when it was last asked for; nothing is read again where it
            has as many.
    """
    path = session.folder.align / "metrics.jsonl"
    found = path.stat() if path.is_file() else None
    size = found.st_size if found else 0
    facts: dict[str, Any] = {
        "bytes": size,
        "live": found is not None and time.time() - found.st_mtime < LIVE_SECONDS,
        "best_step": _best_step(session),
        "epochs": None if session.config.align.steps else session.config.align.epochs,
    }
    if size and size == seen:
        return facts
    lines = read_metrics(path)
    last = lines[-1] if lines else {}
    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "epoch"))
    return facts | {
        "step": last.get("step"),
        "epoch": last.get("epoch"),
        "curves": {name: _curve(lines, name) for name in names},
    }


def _curve(lines: list[dict[str, Any]], name: str) -> dict[str, list[float | None]]:
    """Return a curve of at most `MOST_POINTS`, its last among them; None where it is not finite."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    every = -(-len(points) // MOST_POINTS)
    kept = points[::-1][::every][::-1]
    return {
        "step": [step for step, _ in kept],
        "value": [value if isfinite(value) else None for _, value in kept],
    }


def _best_step(session: Session) -> int | None:
    checkpoint = session.checkpoint()
    if checkpoint is None:
        return None
    return int(checkpoint.metadata.get("best_step") or checkpoint.step)


def health(session: Session, split: str) -> dict[str, Any]:
    """Return the rows and columns of the store of a split."""
    store = session.store(split)
    columns = [store.column(name) for name in store.columns()]
    return {
        "path": str(store.path),
        "rows": store.rows,
        "rows_per_chunk": store.rows_per_chunk,
        "fields": list(store.fields),
        "classes": len(store.class_names or ()),
        "source": {key: value for key, value in store.source.items() if key in ("kind", "path")},
        "columns": [_column_facts(column) for column in columns],
    }


def quarantined(session: Session, split: str, column: str, start: int) -> dict[str, Any]:
    """Return rows that are quarantined in a column, some from a place on, and how many there are.

    Raises:
        StoreError: There is no such column.
    """
    store = session.store(split)
    status = _column(session, split, column).status()
    rows = np.flatnonzero(status > Status.OK)
    part = rows[start : start + ROWS_LISTED]
    keys = store.strings_at("key", part).tolist()
    return {
        "total": len(rows),
        "rows": [
            {"row": row, "key": str(key), "reason": Status(int(status[row])).label}
            for row, key in zip(part.tolist(), keys, strict=True)
        ],
    }


def near_duplicates(session: Session, split: str, column: str) -> dict[str, Any]:
    """Return the pairs of rows whose features are most alike, each row's with its nearest.

    Of more than `ROWS_COMPARED` rows, as many are compared, evenly spaced.

    Raises:
        StoreError: There is no such column.
    """
    opened = _column(session, split, column)
    rows = opened.ok_rows()
    rows = rows[np.linspace(0, len(rows), min(len(rows), ROWS_COMPARED), False, dtype=np.int64)]
    if len(rows) < 2:
        return {"compared": len(rows), "same": 0, "cosine": ALIKE, "pairs": []}
    features = opened.rows_at(rows)
    found = nearest_others(features, 1)
    other, cosine = found.rows[:, 0], found.cosines[:, 0]
    pairs = {
        (min(pair), max(pair)): float(value)
        for *pair, value in zip(rows.tolist(), rows[other].tolist(), cosine, strict=True)
    }
    ordered = sorted(pairs.items(), key=lambda item: -item[1])
    return {
        "compared": len(rows),
        "same": sum(value >= ALIKE for value in pairs.values()),
        "cosine": ALIKE,
        "pairs": [
            {"rows": list(pair), "cosine": round(min(value, 1.0), 5)}
            for pair, value in ordered[:PAIRS]
        ],
    }


def _column(session: Session, split: str, name: str) -> Column:
    store = session.store(split)
    if name not in store.columns():
        raise StoreError(
            f"{store.path} has no column {name!r}. One of {store.columns()} was expected. Choose "
            f"one of these."
        )
    return store.column(name)


def _column_facts(column: Column) -> dict[str, Any]:
    codes, counts = np.unique(column.status(), return_counts=True)
    lengths = _lengths(column)
    fingerprint = column.fingerprint
    return {
        "name": column.name,
        "dim": column.dim,
        "dtype": column.dtype.name,
        "status": {
            Status(int(code)).label: int(count) for code, count in zip(codes, counts, strict=True)
        },
        "model": fingerprint.get("model"),
        "pooling": fingerprint.get("pooling"),
        "licence": fingerprint.get("licence"),
        "lengths": _histogram(lengths),
        "looked_at": len(lengths),
    }


def _lengths(column: Column) -> Float32[np.ndarray, "rows"]:
    """Return the lengths of vectors that are ok, of some chunks evenly spaced."""
    status, found = column.status(), [np.empty(0, dtype=np.float32)]
    done = np.setdiff1d(np.arange(column.num_chunks), column.pending())
    some = np.linspace(0, len(done), min(len(done), CHUNKS_LOOKED_AT), False, dtype=np.int64)
    for chunk in done[some].tolist():
        start = chunk * column.rows_per_chunk
        stop = min(start + column.rows_per_chunk, column.rows)
        ok = status[start:stop] == Status.OK
        found.append(np.linalg.norm(column.read(start, stop)[ok].astype(np.float32), axis=1))
    return np.concatenate(found)


def _histogram(lengths: Float32[np.ndarray, "rows"]) -> dict[str, list[float]] | None:
    if not len(lengths):
        return None
    counts, edges = np.histogram(lengths.astype(np.float64), bins=BINS)
    return {"counts": counts.tolist(), "edges": edges.round(4).tolist()}
