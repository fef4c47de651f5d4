"""CKA with radial basis functions as kernels, in blocks of the kernel matrices."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from evaluate.cka import LEAST_ROWS, ratio

SIDE = 2048
"""Rows and columns of a block: 16 MiB of float32 each, of which some few are held."""
ROWS_FOR_MEDIAN = 2048


class RbfCka:
    """RBF CKA of arrays, made ready to be taken with the rows of the second in other orders.

    The kernel of x and y is exp(−‖x − y‖² / 2σ²). The time grows with the square of the rows, the
    memory only with the rows: no matrix of rows × rows is ever whole.

    Args:
        first: Features.
        second: Features of the same rows.
        debiased: Take the unbiased estimates of HSIC.
        bandwidths: σ of either side; the median distance between rows if not given (of the first
            2,048 rows, so shuffle rows that are sorted).

    Raises:
        ValueError: There are fewer than four rows.

    Reference:
        Kornblith et al. 2019, arXiv:1905.00414, section 4.2 (σ as a share of the median distance).
    """

    def __init__(
        self,
        first: Float[np.ndarray, "rows first_dim"],
        second: Float[np.ndarray, "rows second_dim"],
        *,
        debiased: bool = False,
        bandwidths: tuple[float, float] | None = None,
    ) -> None:
        if len(first) < LEAST_ROWS or len(first) != len(second):
            raise ValueError(
                f"RBF CKA of {len(first)} and {len(second)} rows cannot be taken. As many of both, "
                f"and at least {LEAST_ROWS}, were expected. Give other rows."
            )
        self._first, self._second = _centred(first), _centred(second)
        widths = bandwidths or (median_distance(first), median_distance(second))
        self._widths = widths
        self._debiased = debiased
        self._own = (
            self._hsic(self._first, self._first, (widths[0], widths[0])),
            self._hsic(self._second, self._second, (widths[1], widths[1])),
        )

    def __call__(self, order: Int64[np.ndarray, "rows"] | None = None) -> float:
        """Return the CKA of the first features with the second in an order, or as they are."""
        second = self._second if order is None else self._second[torch.from_numpy(order)]
        return ratio(self._hsic(self._first, second, self._widths), *self._own)

    def _hsic(
        self,
        first: Float32[Tensor, "rows first_dim"],
        second: Float32[Tensor, "rows second_dim"],
        widths: tuple[float, float],
    ) -> float:
        n = len(first)
        first_rows = torch.zeros(n, dtype=torch.float64)
        second_rows = torch.zeros(n, dtype=torch.float64)
        trace = 0.0
        for rows, columns in _blocks(n):
            kernels = [
                _kernel(side[rows], side[columns], width)
                for side, width in zip((first, second), widths, strict=True)
            ]
            if self._debiased and rows == columns:
                for kernel in kernels:
                    kernel.fill_diagonal_(0)
            first_rows[rows] += kernels[0].sum(dim=1, dtype=torch.float64)
            second_rows[rows] += kernels[1].sum(dim=1, dtype=torch.float64)
            trace += float((kernels[0] * kernels[1]).sum(dtype=torch.float64))
        between = float(first_rows @ second_rows)
        sums = float(first_rows.sum() * second_rows.sum())
        if self._debiased:
            total = trace + sums / ((n - 1) * (n - 2)) - 2 * between / (n - 2)
            return total / (n * (n - 3))
        return trace + sums / n**2 - 2 * between / n


def median_distance(features: Float[np.ndarray, "rows dim"]) -> float:
    """Return the median of the distances between rows (the first 2,048); 1 where it is 0."""
    median = float(torch.pdist(_centred(features[:ROWS_FOR_MEDIAN])).median())
    return median if median > 0 else 1.0


def _blocks(rows: int) -> Iterator[tuple[slice, slice]]:
    parts = [slice(start, min(start + SIDE, rows)) for start in range(0, rows, SIDE)]
    for part in parts:
        for other in parts:
            yield part, other


def _kernel(
    rows: Float32[Tensor, "rows dim"], columns: Float32[Tensor, "columns dim"], width: float
) -> Float32[Tensor, "rows columns"]:
    squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return squares.addmm_(rows, columns.T, alpha=-2).clamp_(min=0).div_(-2 * width**2).exp_()


def _centred(features: Float[np.ndarray, "rows dim"]) -> Float32[Tensor, "rows dim"]:
    """Move the origin to the mean: distances stay, and squares lose fewer digits."""
    rows = features.astype(np.float32)
    return torch.from_numpy(rows - rows.mean(axis=0))
