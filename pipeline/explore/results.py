"""The numbers of an evaluation, and the rows that went wrong behind each."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from evaluate.embedder import Embedder
from evaluate.measures.context import Context, Findings
from evaluate.measures.zero_shot import Scored, classify_split
from evaluate.report import Confusions, worst_mistakes
from evaluate.results import Items, Result, read_items, read_results
from evaluate.zero_shot import confusion_matrix
from features.errors import EvaluationError
from pipeline.explore.rows_behind import rows_behind
from pipeline.explore.search import show
from pipeline.explore.session import Session

ROWS_OF_A_PAGE = 24
MISTAKES = 12


@dataclass(frozen=True)
class Measured:
    """A number with the rows it was measured on."""

    result: Result
    rows: Int64[np.ndarray, "items each"]
    """Of each item: one, or the two of a group."""
    items: Items

    @property
    def failed(self) -> Int64[np.ndarray, "failed each"]:
        """The rows of items that did not get all right."""
        counts = 1 if self.items.counts is None else self.items.counts
        return self.rows[np.asarray(self.items.hits) < counts]


def results(session: Session) -> dict[str, Any]:
    """Return every number of `eval/results.json`, and whether it is of the head there is now.

    Raises:
        EvaluationError: The run was not evaluated.
    """
    found, items = _read(session), read_items(session.folder.eval / "items.npz")
    document = json.loads(session.results.read_text(encoding="utf-8"))
    head = session.checkpoint()
    return {
        "is_current": head is not None and head.sha256 == document["checkpoint_sha256"],
        "results": [
            asdict(result)
            | {
                "name": result.name,
                "chance": result.chance,
                "is_detail": result.is_detail,
                "has_rows": result.name in items and rows_behind(session, result) is not None,
            }
            for result in found
        ],
        "classified": [
            result.dataset
            for result in found
            if (result.task, result.metric) == ("zero_shot", "top1") and "/" not in result.dataset
        ],
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
        taken: Only those that were taken for a class; of zero-shot classification.
    """
    measured = _measured(session, name)
    split, failed = measured.result.split, measured.failed
    store, rows = session.store(split), failed.ravel()
    if label is not None:
        rows = np.array([row for row in rows.tolist() if session.class_of(store, row) == label])
    predicted = _predicted(session, measured)
    if taken is not None:
        rows = np.array([row for row in rows.tolist() if predicted.get(row) == taken])
    part = rows[start : start + ROWS_OF_A_PAGE].astype(np.int64).tolist()
    return {
        "split": split,
        "of": len(measured.rows),
        "failed": len(rows) // failed.shape[1],
        "total": len(rows),
        "rows": [
            asdict(row) | {"taken": predicted.get(row.row)} for row in show(session, store, part)
        ],
    }


def classes(session: Session, split: str) -> dict[str, Any]:
    """Return the accuracy of each class of a split, and which class is taken for which."""
    scored, store = _scored(session, split), session.store(split)
    names, labels, right = store.class_names or (), scored.found.labels, scored.found.ranks == 0
    totals = np.bincount(labels, minlength=len(names))
    rights = np.bincount(labels[right], minlength=len(names))
    matrix = confusion_matrix(labels, scored.found.predicted, len(names))
    return {
        "classes": [
            {"name": name, "right": int(rights[i]), "images": int(totals[i])}
            for i, name in enumerate(names)
            if totals[i]
        ],
        "mistakes": [
            asdict(each) for each in worst_mistakes(Confusions(split, names, matrix), MISTAKES)
        ],
    }


def _read(session: Session) -> list[Result]:
    path = session.results
    if not path.is_file():
        raise EvaluationError(
            f"There is no {path}. The results of an evaluation were expected. Run `sail eval`."
        )
    return read_results(path)


def _measured(session: Session, name: str) -> Measured:
    items = read_items(session.folder.eval / "items.npz")
    for result in _read(session):
        if result.name == name:
            rows = rows_behind(session, result)
            if rows is not None and name in items:
                return Measured(result, rows, items[name])
    raise EvaluationError(
        f"The rows behind {name!r} are not known. A number of results.json that is counted over "
        f"rows of a store which has not changed since was expected. Run `sail eval` again."
    )


def _predicted(session: Session, measured: Measured) -> dict[int, str]:
    """Return the class that each row was taken for, of zero-shot classification only."""
    result = measured.result
    if result.task != "zero_shot":
        return {}
    scored = _scored(session, result.split)
    names = session.store(result.split).class_names or ()
    pairs = zip(scored.rows.tolist(), scored.found.predicted.tolist(), strict=True)
    return {row: names[label] for row, label in pairs}


def _scored(session: Session, split: str) -> Scored:
    """Classify a split as `sail eval` does; its prompts are encoded already."""

    def classify() -> Scored:
        aligned, store = session.aligned(), session.store(split)
        embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
        stores = {split: store}
        context = Context(session.config, session.folder, stores, embedder, Findings())
        return classify_split(context, split)

    return session.once(("classified", split), classify)
