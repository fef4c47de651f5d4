"""Permutation nulls and intervals of alignment measures."""

import numpy as np
import pytest

from evaluate.nearest import nearest_others
from evaluate.similarity import LinearCka, MutualKnn
from evaluate.statistics import PairMeasure, calibrate, half_sample_interval, permutation_null


def mutual(first: np.ndarray, second: np.ndarray) -> PairMeasure:
    return MutualKnn(nearest_others(first, 5), nearest_others(second, 5))


class Mean:
    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        self._first, self._second = first, second

    def __call__(self, order: np.ndarray | None = None) -> float:
        second = self._second if order is None else self._second[order]
        return float((self._first + second).mean()) / 2


def drawn(rows: int, dim: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    first = generator.standard_normal((rows, dim))
    return first, first + noise * generator.standard_normal((rows, dim))


@pytest.mark.parametrize("prepare", [LinearCka, mutual])
def test_unrelated_features_are_worth_nothing_however_high_their_value(prepare: type) -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((60, 300)), generator.standard_normal((60, 300))
    found = calibrate(prepare, features, permutations=50, subsamples=0, seed=0)
    assert found.null_mean is not None
    assert found.calibrated == pytest.approx(0, abs=0.05)
    assert found.p_value is not None
    assert found.p_value > 0.02
    assert found.interval is None


def test_related_features_beat_all_shuffled_pairs() -> None:
    found = calibrate(mutual, drawn(80, 6, 0.3, 0), permutations=50, subsamples=20, seed=0)
    assert found.p_value == pytest.approx(1 / 51)
    assert found.null_mean == pytest.approx(5 / 79, abs=0.02)  # k of the n − 1 others, by chance
    assert found.null_mean is not None
    assert found.calibrated == pytest.approx(
        (found.value - found.null_mean) / (1 - found.null_mean)
    )
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]


def test_the_same_features_keep_the_value_one() -> None:
    features, _ = drawn(40, 6, 0, 0)
    found = calibrate(LinearCka, (features, features), permutations=20, subsamples=0, seed=0)
    assert found.value == pytest.approx(1)
    assert found.null_mean is not None
    assert found.calibrated == pytest.approx(1)


def test_the_same_seed_gives_the_same_null_and_interval() -> None:
    features = drawn(40, 6, 1, 0)
    measure = LinearCka(*features)
    nulls = [permutation_null(measure, 40, permutations=5, seed=seed) for seed in (1, 1, 2)]
    assert nulls[0].tolist() == nulls[1].tolist() != nulls[2].tolist()
    intervals = [
        half_sample_interval(LinearCka, features, 0.5, subsamples=9, seed=s) for s in (1, 1)
    ]
    assert intervals[0] == intervals[1]


def test_the_interval_of_twenty_halves_holds_the_true_value_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(1000):
        rows = generator.standard_normal((60, 1))  # whose mean is 0
        interval = half_sample_interval(
            Mean, (rows, rows), float(rows.mean()), subsamples=20, seed=seed
        )
        assert interval is not None
        held += interval[0] < 0 < interval[1]
    assert 0.93 < held / 1000 < 0.97


@pytest.mark.parametrize("halves", [0, 1])
def test_fewer_than_two_halves_give_no_interval(halves: int) -> None:
    assert (
        half_sample_interval(LinearCka, drawn(40, 6, 1, 0), 0.5, subsamples=halves, seed=0) is None
    )


@pytest.mark.parametrize("prepare", [LinearCka, mutual])
def test_halves_vary_as_much_as_the_value_does_over_new_data(prepare: type) -> None:
    values = [prepare(*drawn(160, 4, 0.7, seed))() for seed in range(120)]
    widths = []
    for seed in range(12):
        interval = half_sample_interval(
            prepare, drawn(160, 4, 0.7, seed), 0.0, subsamples=100, seed=0
        )
        assert interval is not None
        widths.append(interval[1] - interval[0])
    expected = 2 * 1.96 * np.std(values)
    assert 0.7 * expected < np.mean(widths) < 1.5 * expected
