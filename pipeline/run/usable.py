"""Says where a whole column is of no use, which many small faults would otherwise hide."""

import logging
from collections import Counter
from collections.abc import Iterable

from features.errors import SourceError
from features.status import Status
from features.storage.column import Column, encoder_of
from features.store import FeatureStore

logger = logging.getLogger(__name__)
LOUD_FRACTION = 0.05
"""Clean data have fewer rows that cannot be used."""
ROWS_COMPARED = 64
FEWEST_COMPARED = 8


def check_usable(stores: Iterable[FeatureStore]) -> None:
    """Look at all columns that are complete; warn of what is odd in one.

    Raises:
        SourceError: An encoder has not one usable row in a store. All stores are looked at first.
    """
    useless = []
    for store in stores:
        ok, reasons = Counter[str](), dict[str, Counter[int]]()
        for name in store.columns():
            column = store.column(name)
            if column.pending():
                continue
            counts = Counter(column.status().tolist())
            encoder = encoder_of(name)
            ok[encoder] += counts[Status.OK]
            reasons[encoder] = reasons.get(encoder, Counter()) + counts
            _warn(store, name, counts)
            _compare(store, column, name)
        useless += [
            f"{store.path}/{encoder}: {_listed(reasons[encoder])}"
            for encoder in ok
            if not ok[encoder]
        ]
    if useless:
        raise SourceError(
            f"Not one row can be used of {'; '.join(useless)}. Rows that an encoder can read were "
            f"expected. See why with `sail inspect`, and correct the source."
        )


def _warn(store: FeatureStore, name: str, counts: Counter[int]) -> None:
    """Say loudly where more rows are quarantined than clean data have; captions may be missing."""
    bad = {code: count for code, count in counts.items() if code != Status.OK}
    bad.pop(Status.MISSING_CAPTION, None)
    total = sum(bad.values())
    if LOUD_FRACTION * store.rows < total < store.rows:
        logger.warning(
            "%s  %s: %d of %d rows cannot be used, more than clean data have: %s",
            store.path.stem,
            name,
            total,
            store.rows,
            _listed(Counter(bad)),
        )


def _compare(store: FeatureStore, column: Column, name: str) -> None:
    """Warn where rows of different contents all have one vector."""
    ok = column.ok_rows()
    rows = ok[:: max(1, len(ok) // ROWS_COMPARED)][:ROWS_COMPARED]
    if len(rows) < FEWEST_COMPARED:
        return
    if name.startswith("text/"):
        texts = store.captions(name.rpartition("/")[2])[rows]
        if len(set(texts.tolist())) == 1:
            return
    features = column.rows_at(rows)
    if bool((features == features[0]).all()):
        logger.warning(
            "%s  %s: all of %d rows that were compared have one and the same vector; nothing can "
            "be learned from it. Look at the images, and at the processor of the encoder",
            store.path.stem,
            name,
            len(rows),
        )


def _listed(counts: Counter[int]) -> str:
    return ", ".join(f"{Status(code).label} {count}" for code, count in counts.most_common(3))
