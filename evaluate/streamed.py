"""Measures of alignment over more pairs of rows than can be held, or compared all with all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int64

from evaluate.bootstrap import ratio_interval
from evaluate.cka import cka_of, mean_shuffled_cka
from evaluate.moments import PairMoments
from evaluate.mutual_knn import MutualKnn, nearest_among
from evaluate.permutation import Calibrated
from evaluate.svcca import mean_shuffled_svcca, svcca_of

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
        interval = ratio_interval(shared, np.full_like(shared, k), resamples=resamples, seed=seed)
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
