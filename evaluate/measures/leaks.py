"""Pictures that are measured on and were trained on too: leaks between splits."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int64

from evaluate.config import EvalSettings, Names
from evaluate.measures.measure import Context, Measure, Splits, is_labelled
from evaluate.nearest import nearest_neighbours
from evaluate.results import Findings, Result
from features.errors import UnusableSplitError
from features.storage.column import Column
from features.store import FeatureStore

SAME = 0.99
"""Cosine from which two pictures count as one. Of 1,000 test pictures and 6,000 trained on, all
different, the nearest had 0.82 (Flickr8k, MobileNetV2) and 0.988 (drawn scenes, their own encoder);
a copy has 1.00."""
MOST_QUERIES = 1000
MOST_PRODUCTS = 1 << 36
"""Queries × trained rows × dim: a second or two of two processor cores."""
ROWS_FOR_MEAN = 4096
SHOWN = 3


class LeakSettings(EvalSettings):
    """Settings of the search for leaks."""

    leaks: Names = ()
    """Splits that are searched for pictures that were trained on; all that are measured if empty.
    """


class Leaks(Measure):
    """Share of the pictures of a split that the head was trained on."""

    name = "leaks"
    title = "Pictures seen in training"
    in_short = "How many of the pictures were trained on, too: the other scores flatter by them"
    explained = (
        "A score on pictures that were trained on says little of new ones. A picture counts as "
        "**seen** where one of those that were trained on has nearly the same frozen features: the "
        "same file, or a copy of it. More than a few in a hundred, and the other scores are too "
        "good."
    )
    method = (
        f"The nearest trained row by the cosine of frozen features, less the mean of those that "
        f"were trained on; from {SAME:g} on it is the same picture. At most {MOST_QUERIES:,} "
        f"pictures, and so many trained rows as the protocol says, are compared."
    )
    metric = "seen"
    greater_is_better = False
    has_headline = False
    is_of_head = False
    of_groups = True
    settings = LeakSettings
    needs = "captions, labels or groups"

    def can_measure(self, store: FeatureStore) -> bool:
        """Return whether anything else is measured on it."""
        return bool(store.fields) or is_labelled(store) or store.groups() is not None

    def splits(self, settings: EvalSettings, splits: Splits) -> tuple[str, ...]:
        """Return the splits; none where the head was trained elsewhere."""
        return super().splits(settings, splits) if splits.trained else ()

    def run(self, context: Context, split: str) -> Findings:
        """Compare pictures of the split with those of every split that was trained on."""
        found, name = Findings(), f"image/{context.embedder.image}"
        store = context.stores[split]
        column = store.column(name)
        rows = _evenly(column.ok_rows(), MOST_QUERIES)
        if not len(rows):
            raise UnusableSplitError(
                f"{column.path} has no row that is ok. One was expected. See why with `sail "
                f"inspect {store.path}`."
            )
        queries = column.rows_at(rows).astype(np.float32)
        trained = [context.stores[each] for each in context.trained if each != split]
        most = max(ROWS_FOR_MEAN, MOST_PRODUCTS // queries.size // max(1, len(trained)))
        nearest = np.full(len(rows), -1.0, dtype=np.float32)
        like = np.full(len(rows), "", dtype=object)
        compared = of = 0
        for reference in trained:
            other = reference.column(name)
            chosen = _chunks_of(other.ok_rows(), reference.rows_per_chunk, most)
            compared, of = compared + len(chosen), of + reference.rows
            cosines, places = _nearest(queries, other, chosen)
            is_nearer = cosines > nearest
            nearest[is_nearer] = cosines[is_nearer]
            for number in np.flatnonzero(is_nearer & (cosines >= SAME))[:SHOWN]:
                row = int(chosen[places[number]])
                like[number] = str(reference.keys(row, row + 1)[0])
        seen = nearest >= SAME
        found.add(
            Result(
                task="leaks",
                dataset=split,
                metric="seen",
                value=float(seen.mean()),
                n=len(rows),
                ci95=None,
                encoders={"image": context.embedder.image, "text": None},
                protocol={
                    "cosine": SAME,
                    "vectors": "frozen image features less the mean of those trained on",
                    "trained": list(context.trained),
                    "trained_rows_compared": compared,
                    "trained_rows": of,
                    "pictures": len(column.ok_rows()),
                },
            )
        )
        if seen.any():
            found.note(_told(store, split, rows, seen, like))
        return found


def _told(
    store: FeatureStore,
    split: str,
    rows: Int64[np.ndarray, "queries"],
    seen: np.ndarray,
    like: np.ndarray,
) -> str:
    examples = [
        f"{store.keys(int(rows[i]), int(rows[i]) + 1)[0]} is {like[i]}"
        for i in np.flatnonzero(seen)
        if like[i]
    ]
    return (
        f"{int(seen.sum()):,} of {len(rows):,} pictures of {split} were trained on, too (cosine of "
        f"their features {SAME:g} or more), such as {'; '.join(examples[:SHOWN])}. The scores on "
        f"{split} are too good by them: take them out of one of the two."
    )


def _evenly(rows: Int64[np.ndarray, "rows"], most: int) -> Int64[np.ndarray, "some"]:
    """Return at most so many rows, spread evenly."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _chunks_of(
    rows: Int64[np.ndarray, "rows"], rows_per_chunk: int, most: int
) -> Int64[np.ndarray, "some"]:
    """Return the rows of some whole chunks, spread evenly: those are read at the speed of the disk.

    At least one chunk is taken, and of it at most so many rows.
    """
    if len(rows) <= most:
        return rows
    chunks = rows // rows_per_chunk
    chosen = _evenly(np.unique(chunks), max(1, most // rows_per_chunk))
    return rows[np.isin(chunks, chosen)][:most]


def _nearest(
    queries: Float[np.ndarray, "queries dim"],
    column: Column,
    rows: Int64[np.ndarray, "rows"],
) -> tuple[Float[np.ndarray, "queries"], Int64[np.ndarray, "queries"]]:
    """Return the cosine and the place of the nearest of some rows, all less their mean."""
    if not len(rows):
        none = np.zeros(len(queries), dtype=np.int64)
        return np.full(len(queries), -1.0, dtype=np.float32), none
    mean = column.rows_at(_evenly(rows, ROWS_FOR_MEAN)).mean(axis=0, dtype=np.float32)

    def centred() -> Iterator[np.ndarray]:
        for block in column.blocks(rows):
            yield block.astype(np.float32) - mean

    found = nearest_neighbours(queries - mean, centred(), 1)
    return found.cosines[:, 0], found.rows[:, 0]


def leaked(results: Sequence[Result]) -> list[Result]:
    """Return the results that tell of pictures that were trained on, too."""
    return [each for each in results if each.task == "leaks" and each.value > 0]
