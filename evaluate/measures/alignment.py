"""How alike image and text features of the same rows are, before and after the head."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt, model_validator

from evaluate.config import EvalSettings, Names
from evaluate.measures.measure import Context, Measure
from evaluate.measures.retrieval import RetrievalSettings
from evaluate.nearest import nearest_among, nearest_others
from evaluate.results import Findings, Items, Result
from evaluate.similarity import (
    Cknna,
    LinearCka,
    MutualKnn,
    PairMoments,
    RbfCka,
    Svcca,
    cka_of,
    mean_shuffled_cka,
    mean_shuffled_svcca,
    svcca_of,
)
from evaluate.statistics import Calibrated, PairMeasure, Prepare, calibrate, interval_of
from features.config import EachOnce
from features.storage.column import Column

logger = logging.getLogger(__name__)
AlignmentName = Literal["cka", "cka_debiased", "cka_rbf", "mutual_knn", "cknna", "svcca"]
LEAST_ROWS = 16
"""Halves of fewer rows say nothing."""


class AlignmentSettings(EvalSettings):
    """Settings of alignment."""

    alignment: Names = ()
    """Splits on whose pairs the alignment of image with text features is measured; every split with
    captions but the training split and those with groups, if empty."""
    alignment_measures: Annotated[tuple[AlignmentName, ...], EachOnce] = (
        "cka",
        "cka_debiased",
        "mutual_knn",
        "cknna",
    )
    """Measures of alignment (docs/protocols.md); none if empty. `cka_rbf` and `svcca` take the
    longest."""
    alignment_rows: PositiveInt = 1024
    """Pairs, drawn by `seed`, on which alignment is measured, at most. Values of mutual k-NN and
    CKNNA depend on it: compare only values of as many."""
    alignment_held: PositiveInt = 4096
    """Where `alignment_rows` is more than this, so many pairs are held in memory: they ask for
    their neighbours among all (`mutual_knn`), and `cknna` and `cka_rbf`, which compare all pairs
    with all, are taken on them alone; `cka`, `cka_debiased` and `svcca` are of all pairs."""
    alignment_k: PositiveInt = 10
    """Neighbours of mutual k-NN and CKNNA; two at least for CKNNA."""
    alignment_permutations: int = Field(default=20, ge=0)
    """How often pairs are shuffled for the null of an alignment measure; 0 leaves it out."""
    alignment_subsamples: int = Field(default=20, ge=0)
    """Halves of the rows for its 95 % interval; fewer than two leave it out."""

    @model_validator(mode="after")
    def _cknna_has_neighbours(self) -> "AlignmentSettings":
        if self.alignment_k < 2 and "cknna" in self.alignment_measures:
            raise ValueError(
                "alignment_k = 1, but cknna needs two neighbours at least. Raise it, or leave "
                "cknna out of alignment_measures"
            )
        return self


class Alignment(Measure):
    """Similarity of the image and the text features of the same rows."""

    name = "alignment"
    title = "Alignment"
    in_short = "Whether images that are near each other have captions that are so, too"
    explained = (
        "How alike the picture and caption numbers of the same rows are, from 0 to 1: whether "
        "pictures that are near one another have captions that are near one another. A value alone "
        "says little, since wide features and few rows lift it; **shuffled** is its mean when "
        "pictures and captions are paired at random, and **calibrated** puts that at 0."
    )
    metric = "mutual_knn"
    in_percent = has_headline = False
    settings = AlignmentSettings
    template = "alignment.html.j2"

    def run(self, context: Context, split: str) -> Findings:
        """Measure every image column against every text encoder, then the embeddings of the head.

        Of the caption fields the first one that retrieval searches is taken: one caption a row.
        """
        from evaluate.embedder import complete_column

        store, found, embedder = context.stores[split], Findings(), context.embedder
        searched = context.settings.of(RetrievalSettings).retrieval_fields
        field = context.caption_fields(split, searched, "retrieval_fields")[0]
        there = {name for name in store.columns() if not store.column(name).pending()}
        pairs = [
            _Pair(
                task=f"alignment/{image}|{text}/{field}",
                about="frozen features",
                image=complete_column(store, f"image/{image}"),
                text=complete_column(store, f"text/{text}/{field}"),
                field=field,
                encoders={"image": image, "text": text},
                vectors=Column.blocks,
            )
            for image in context.image_columns
            for text in context.text_encoders
            if {f"image/{image}", f"text/{text}/{field}"} <= there
        ]
        pairs.append(
            _Pair(
                task="alignment/embeddings",
                about="aligned embeddings",
                image=embedder.image_column(store),
                text=embedder.text_column(store, field),
                field=field,
                encoders=context.encoders,
                vectors=embedder.blocks,
            )
        )
        for pair in pairs:
            _score(context, found, split, pair)
        return found


@dataclass(frozen=True)
class _Pair:
    """Two columns that are compared on rows that both have."""

    task: str
    about: str
    image: Column
    text: Column
    field: str
    encoders: dict[str, str | None]
    vectors: Callable[[Column, Int64[np.ndarray, "rows"]], Iterator[Float[np.ndarray, "_ dim"]]]


def _score(context: Context, found: Findings, split: str, pair: _Pair) -> None:
    settings = context.settings.of(AlignmentSettings)
    both = np.intersect1d(pair.image.ok_rows(), pair.text.ok_rows())
    held = min(len(both), settings.alignment_rows, settings.alignment_held)
    if held < max(LEAST_ROWS, 2 * settings.alignment_k + 2):
        found.note(
            f"{pair.task} is left out: only {held} rows of {split} that have both an image and a "
            f"caption are compared, too few for k = {settings.alignment_k}."
        )
        return
    sides = [partial(pair.vectors, column) for column in (pair.image, pair.text)]
    for taken in alignment_values(sides[0], sides[1], both, settings):
        found.add(
            Result(
                task=pair.task,
                dataset=split,
                metric=taken.name,
                value=taken.calibrated.value,
                n=taken.n,
                ci95=taken.calibrated.interval,
                encoders=pair.encoders,
                protocol=taken.protocol | {"vectors": pair.about, "captions": [pair.field]},
            )
        )


Blocks = Callable[[], Iterator[Float[np.ndarray, "_ dim"]]]
"""Reads the rows of one side anew, block by block."""


@dataclass(frozen=True)
class StreamedPair:
    """Two sets of features of the same rows, of which one block and a sample are held.

    Each measure takes what `calibrate` found of the sample alone and returns the same of all rows:
    the value of all; as its null the mean over all shuffles, by formula; the p-value as it is.
    """

    blocks: tuple[Blocks, Blocks]
    """Of all rows, in the same blocks on both sides."""
    rows: int
    sample: Int64[np.ndarray, "sample"]
    """Positions among the rows."""
    features: tuple[Float[np.ndarray, "sample first_dim"], Float[np.ndarray, "sample second_dim"]]
    """Of the sample."""

    @cached_property
    def moments(self) -> PairMoments:
        """Sums over all pairs, from which linear CKA and SVCCA follow; one pass."""
        first, second = self.blocks
        return PairMoments.over(zip(first(), second(), strict=True))

    def cka(self, sampled: Calibrated, *, debiased: bool = False) -> Calibrated:
        """Return linear CKA."""
        value = cka_of(self.moments, debiased=debiased)
        chance = mean_shuffled_cka(self.moments, debiased=debiased)
        return self._narrowed(sampled, value, chance)

    def svcca(self, sampled: Calibrated, *, dims: int) -> Calibrated:
        """Return SVCCA."""
        value = svcca_of(self.moments, dims=dims)
        return self._narrowed(sampled, value, mean_shuffled_svcca(self.rows, dims=dims))

    def mutual_knn(self, sampled: Calibrated, *, k: int, resamples: int, seed: int) -> Calibrated:
        """Return mutual k-NN of the rows of the sample, their neighbours sought among all rows.

        Args:
            sampled: Found of the sample alone.
            k: Neighbours.
            resamples: How often the rows of the sample are drawn for the interval.
            seed: Of the drawing.
        """
        near = [
            nearest_among(features, self.sample, blocks(), k)
            for features, blocks in zip(self.features, self.blocks, strict=True)
        ]
        shared = np.rint(k * MutualKnn(*near).of_rows()).astype(np.int64)
        items = Items(shared, np.full_like(shared, k))
        interval = interval_of(items, resamples=resamples, seed=seed)
        value, chance = float(shared.mean()) / k, k / (self.rows - 1)
        return replace(_against(sampled, value, chance), interval=interval)

    def _narrowed(self, sampled: Calibrated, value: float, chance: float) -> Calibrated:
        """Put the interval about the value of all rows, narrowed by the root of how many more."""
        found = _against(sampled, value, chance)
        if sampled.interval is None:
            return found
        scale = (len(self.sample) / self.rows) ** 0.5
        low, high = (value + (edge - sampled.value) * scale for edge in sampled.interval)
        return replace(found, interval=(low, high))


def _against(sampled: Calibrated, value: float, chance: float) -> Calibrated:
    """Replace value and null; the interval is left to be replaced."""
    return replace(
        sampled,
        value=value,
        null_mean=chance,
        calibrated=(value - chance) / (1 - chance) if chance < 1 else 0.0,
    )


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
    first: Side, second: Side, both: Int64[np.ndarray, "rows"], settings: AlignmentSettings
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
        prepare, about = pair_measure(name, settings.alignment_k)
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


def _streamed(
    name: str, pair: StreamedPair, found: Calibrated, settings: AlignmentSettings
) -> Calibrated:
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


def pair_measure(name: AlignmentName, k: int) -> tuple[Prepare, dict[str, object]]:
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
) -> PairMeasure:
    return measure(nearest_others(first, k), nearest_others(second, k))
