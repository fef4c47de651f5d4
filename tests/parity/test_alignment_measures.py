"""Alignment measures against the code that was released with them.

The numbers were made by `metrics.py` of github.com/minyoungg/platonic-rep at commit dcd76ba
(2025-04-12) with torch 2.13 in float64, given the features below times 100: it adds 1e-6 to the
denominators, which does not count then, and nothing else depends on the scale but `rbf_sigma`,
given as 100 there for 1 here.
"""

import numpy as np
import pytest

from evaluate.nearest import nearest_others
from evaluate.similarity import Cknna, LinearCka, MutualKnn, RbfCka


def features(rows: int = 200, dims: tuple[int, int] = (24, 16)) -> list[np.ndarray]:
    """Unit vectors by a formula, so that no generator of random numbers has part in them."""
    steps = np.arange(rows)[:, None] + 1.0
    shared = np.sin(steps * np.sqrt(np.arange(2.0, 8.0)))
    sides = []
    for side, dim in enumerate(dims):
        mix = np.cos(np.outer(np.arange(6.0) + 1, np.arange(dim) + 1 + side))
        own = np.sin(steps * np.sqrt(np.arange(dim) + 11.5 + 30 * side))
        vectors = shared @ mix + 1.5 * own
        sides.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return sides


@pytest.mark.parametrize(
    ("k", "mutual_knn", "cknna"),
    [
        (5, 0.12999999523162842, 0.10755409788808379),
        (10, 0.23650000989437103, 0.19816681829345092),
    ],
)
def test_mutual_knn_and_cknna_are_those_of_platonic_rep(
    k: int, mutual_knn: float, cknna: float
) -> None:
    first, second = (nearest_others(side, k) for side in features())
    assert MutualKnn(first, second)() == pytest.approx(mutual_knn, abs=1e-5)
    assert Cknna(first, second)() == pytest.approx(cknna, abs=1e-5)


def test_linear_cka_is_that_of_platonic_rep() -> None:
    assert LinearCka(*features())() == pytest.approx(0.5916323535801093, abs=1e-5)
    debiased = LinearCka(*features(), debiased=True)()
    assert debiased == pytest.approx(0.5670394364767936, abs=1e-5)


def test_rbf_cka_is_that_of_platonic_rep() -> None:
    found = RbfCka(*features(), bandwidths=(1.0, 1.0))()
    assert found == pytest.approx(0.6191660261188822, abs=1e-5)
