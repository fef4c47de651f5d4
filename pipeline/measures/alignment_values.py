"""The measures of alignment of two columns: on pairs that are held, or streamed over all."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int64

from evaluate.cka import LinearCka
from evaluate.config import EvalConfig
from evaluate.mutual_knn import Cknna, MutualKnn, nearest_others
from evaluate.permutation import Calibrated, Measure, Prepare, calibrate
from evaluate.rbf_cka import RbfCka
from evaluate.streamed import StreamedPair
from evaluate.svcca import Svcca

logger = logging.getLogger(__name__)
DIMS = 10  # of SVCCA
STREAMED = frozenset({"cka", "cka_debiased", "svcca", "mutual_knn"})
"""What is taken over all pairs, however many; the others compare all with all."""
Side = Callable[[Int64[np.ndarray, "rows"]], Iterator[Float[np.ndarray, "_ dim"]]]
"""Reads rows of one side, which must be in order, block by block."""


@dataclass(frozen=True)
class AlignmentValue:
    """A measure, its value, and how it was taken."""

    name: str
    calibrated: Calibrated
    n: int
    """Pairs it was taken on; of mutual k-NN, those that asked for their neighbours."""
    protocol: dict[str, object]


def alignment_values(
    first: Side, second: Side, both: Int64[np.ndarray, "rows"], settings: EvalConfig
) -> Iterator[AlignmentValue]:
    """Take the measures that the settings name.

    Up to `alignment_held` pairs are held. Of more, so many are drawn, and what compares all pairs
    with all is taken on them alone; the rest is taken over all pairs, read block by block.

    Args:
        first: The features of one side.
        second: The features of the other, in the same blocks.
        both: Rows that have both.
        settings: Which measures, and of how many pairs.
    """
    generator = np.random.default_rng(settings.seed)
    number = min(settings.alignment_rows, len(both))
    rows = np.sort(generator.choice(both, number, replace=False))
    sample = np.sort(generator.choice(number, min(settings.alignment_held, number), replace=False))
    features = tuple(np.concatenate(list(side(rows[sample]))) for side in (first, second))
    pair = StreamedPair(
        (partial(first, rows), partial(second, rows)), number, sample, (features[0], features[1])
    )
    for name in settings.alignment_measures:
        prepare, about = _measure(name, settings.alignment_k)
        found = calibrate(
            prepare,
            pair.features,
            permutations=settings.alignment_permutations,
            subsamples=settings.alignment_subsamples,
            seed=settings.seed,
        )
        is_streamed = name in STREAMED and len(sample) < number
        if is_streamed:
            logger.info("taking %s over %d pairs", name, number)
            found = _streamed(name, pair, found, settings)
        taken = number if is_streamed else len(sample)
        protocol = about | {
            "rows": f"{taken} of {len(both)}, drawn with seed {settings.seed}",
            "interval": found.interval
            and f"Student's t, {settings.alignment_subsamples} halves of the rows",
            "permutations": settings.alignment_permutations,
            "chance": found.null_mean,
            "calibrated": found.calibrated,
            "p_value": found.p_value,
        }
        if is_streamed:
            protocol |= _described(name, len(sample), number)
        is_asked = is_streamed and name == "mutual_knn"
        yield AlignmentValue(name, found, len(sample) if is_asked else taken, protocol)


def _streamed(name: str, pair: StreamedPair, found: Calibrated, settings: EvalConfig) -> Calibrated:
    known: dict[str, Callable[[Calibrated], Calibrated]] = {
        "cka": pair.cka,
        "cka_debiased": partial(pair.cka, debiased=True),
        "svcca": partial(pair.svcca, dims=DIMS),
        "mutual_knn": partial(
            pair.mutual_knn,
            k=settings.alignment_k,
            resamples=settings.bootstrap,
            seed=settings.seed,
        ),
    }
    return known[name](found)


def _described(name: str, held: int, rows: int) -> dict[str, object]:
    """Return what is told of a streamed measure besides, or in other words than of one held."""
    null: dict[str, object] = {"null": f"chance by formula, p-value of {held} of the rows"}
    if name == "mutual_knn":
        about = f"bootstrap over the {held} rows that ask"
        return null | {"queries": f"{held} of the rows, asked among all", "interval": about}
    return null | {"interval": f"halves of {held} of the rows, narrowed by √({held} / {rows})"}


def _measure(name: str, k: int) -> tuple[Prepare, dict[str, object]]:
    """Return a measure by its name, and what could change it."""
    neighbours: dict[str, object] = {"k": k, "similarity": "cosine"}
    known: dict[str, tuple[Prepare, dict[str, object]]] = {
        "cka": (LinearCka, {"kernel": "linear"}),
        "cka_debiased": (partial(LinearCka, debiased=True), {"kernel": "linear"}),
        "cka_rbf": (RbfCka, {"kernel": "RBF, σ the median distance"}),
        "mutual_knn": (partial(_of_neighbours, MutualKnn, k), neighbours),
        "cknna": (partial(_of_neighbours, Cknna, k), neighbours),
        "svcca": (partial(Svcca, dims=DIMS), {"dims": DIMS}),
    }
    return known[name]


def _of_neighbours(
    measure: type[MutualKnn] | type[Cknna],
    k: int,
    first: Float[np.ndarray, "rows first_dim"],
    second: Float[np.ndarray, "rows second_dim"],
) -> Measure:
    return measure(nearest_others(first, k), nearest_others(second, k))
