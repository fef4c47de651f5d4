"""Sums over pairs of rows, in one pass over blocks, from which linear CKA and SVCCA follow."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

Pair = tuple[Float[np.ndarray, "_ first_dim"], Float[np.ndarray, "_ second_dim"]]
"""The same rows of two sets of features."""


@dataclass
class CrossMoments:
    """What HSIC with linear kernels needs of rows a and b: memory dim², whatever the rows.

    With K = AAᵀ and L = BBᵀ every sum over the rows × rows entries of K and L is one over these.
    """

    rows: int
    first_sum: Float64[np.ndarray, "first_dim"]
    second_sum: Float64[np.ndarray, "second_dim"]
    product: Float64[np.ndarray, "first_dim second_dim"]
    """AᵀB."""
    first_trace: float
    """Σ ‖a‖²."""
    second_trace: float
    diagonals: float
    """Σ ‖a‖²‖b‖²."""
    first_by_diagonal: Float64[np.ndarray, "first_dim"]
    """Σ a ‖b‖²."""
    second_by_diagonal: Float64[np.ndarray, "second_dim"]
    """Σ b ‖a‖²."""

    @classmethod
    def of(
        cls, first: Float64[np.ndarray, "rows first_dim"], second: Float64[np.ndarray, "rows dim"]
    ) -> "CrossMoments":
        """Sum over the rows of one block."""
        first_norms, second_norms = np.square(first).sum(axis=1), np.square(second).sum(axis=1)
        return cls(
            rows=len(first),
            first_sum=first.sum(axis=0),
            second_sum=second.sum(axis=0),
            product=first.T @ second,
            first_trace=float(first_norms.sum()),
            second_trace=float(second_norms.sum()),
            diagonals=float(first_norms @ second_norms),
            first_by_diagonal=second_norms @ first,
            second_by_diagonal=first_norms @ second,
        )

    def add(self, other: "CrossMoments") -> None:
        """Add the sums of further rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def centred_product(self) -> Float64[np.ndarray, "first_dim second_dim"]:
        """AᵀB after the means are taken from A and B."""
        centred: np.ndarray = self.product - np.outer(self.first_sum, self.second_sum) / self.rows
        return centred

    def hsic(self) -> float:
        """Return tr(KHLH), the biased HSIC times (rows − 1)², H taking out the mean.

        Reference:
            Gretton et al. 2005, Measuring Statistical Dependence with Hilbert–Schmidt Norms, eq. 9.
        """
        return float(np.square(self.centred_product).sum())

    def debiased_hsic(self) -> float:
        """Return the unbiased estimate of HSIC, which is 0 on average for independent rows.

        Reference:
            Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, eq. 5.
        """
        n = self.rows
        # K̃ and L̃ are K and L with a diagonal of zeros.
        trace = np.square(self.product).sum() - self.diagonals
        first = self.first_sum @ self.first_sum - self.first_trace
        second = self.second_sum @ self.second_sum - self.second_trace
        between = (
            self.first_sum @ self.product @ self.second_sum
            - self.first_sum @ self.first_by_diagonal
            - self.second_sum @ self.second_by_diagonal
            + self.diagonals
        )
        total = trace + first * second / ((n - 1) * (n - 2)) - 2 * between / (n - 2)
        return float(total / (n * (n - 3)))


@dataclass
class PairMoments:
    """The sums of each side with itself, and of the two."""

    first: CrossMoments
    second: CrossMoments
    both: CrossMoments

    @classmethod
    def over(cls, pairs: Iterable[Pair]) -> "PairMoments":
        """Sum over blocks of pairs of rows, of which one block is held at a time, in float64.

        The mean of the first block is taken from all rows: no measure here depends on where the
        origin is, and sums far from it would lose digits.

        Args:
            pairs: Blocks of the first and the second features; row i of one belongs to row i of
                the other.

        Raises:
            ValueError: There is no row, or a block has not as many rows on both sides.
        """
        total: PairMoments | None = None
        origins: tuple[np.ndarray, np.ndarray] | None = None
        for first, second in pairs:
            _check_rows(first, second)
            if not len(first):
                continue
            first, second = first.astype(np.float64), second.astype(np.float64)
            origins = origins or (first.mean(axis=0), second.mean(axis=0))
            block = cls.of(first - origins[0], second - origins[1])
            if total is None:
                total = block
            else:
                total.add(block)
        if total is None:
            raise ValueError("There are no pairs of rows. At least one block of them was expected.")
        return total

    @classmethod
    def of(
        cls, first: Float64[np.ndarray, "rows first_dim"], second: Float64[np.ndarray, "rows dim"]
    ) -> "PairMoments":
        """Sum over one block, as it is."""
        return cls(
            CrossMoments.of(first, first),
            CrossMoments.of(second, second),
            CrossMoments.of(first, second),
        )

    def add(self, other: "PairMoments") -> None:
        """Add the sums of further rows."""
        self.first.add(other.first)
        self.second.add(other.second)
        self.both.add(other.both)


def _check_rows(first: np.ndarray, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"A block has {len(first)} rows on the first side and {len(second)} on the second. As "
            f"many on both were expected. Take the same rows of both."
        )
