"""Alignment over more pairs than are held: the values, nulls and intervals of all rows."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from evaluate.measures.alignment import (
    AlignmentSettings,
    AlignmentValue,
    StreamedPair,
    alignment_values,
)
from evaluate.nearest import nearest_others
from evaluate.similarity import (
    Cknna,
    LinearCka,
    MutualKnn,
    Svcca,
    mean_shuffled_cka,
    mean_shuffled_svcca,
)
from evaluate.statistics import Calibrated, calibrate, permutation_null

ROWS, K = 300, 7
UNKNOWN = Calibrated(0.0, None, None, None, None)
ALL = ("cka", "cka_debiased", "svcca", "mutual_knn", "cknna")


def drawn(rows: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of 12 and 10 dimensions that share four directions."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((rows, 4)) * [4, 3, 2, 1]
    first, second = (
        3
        + shared @ generator.standard_normal((4, dim))
        + 2 * generator.standard_normal((rows, dim))
        for dim in (12, 10)
    )
    return first, second


def blocks(features: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), 41):
        yield features[rows[start : start + 41]]


def pair_of(features: tuple[np.ndarray, np.ndarray], sample: np.ndarray) -> StreamedPair:
    every = np.arange(len(features[0]))
    first, second = (partial(blocks, side, every) for side in features)
    held = features[0][sample], features[1][sample]
    return StreamedPair((first, second), len(every), sample, held)


def values_of(features: tuple[np.ndarray, np.ndarray], **settings: object) -> list[AlignmentValue]:
    config = AlignmentSettings(alignment_k=K, alignment_measures=ALL, **settings)  # type: ignore[arg-type]
    first, second = (partial(blocks, side) for side in features)
    return list(alignment_values(first, second, np.arange(len(features[0])), config))


def test_values_over_blocks_are_those_of_all_rows_held_at_once() -> None:
    features = drawn()
    pair = pair_of(features, np.arange(20))
    assert pair.cka(UNKNOWN).value == pytest.approx(LinearCka(*features)())
    debiased = LinearCka(*features, debiased=True)()
    assert pair.cka(UNKNOWN, debiased=True).value == pytest.approx(debiased)
    assert pair.svcca(UNKNOWN, dims=3).value == pytest.approx(Svcca(*features, dims=3)())


def test_mutual_knn_of_a_sample_is_the_share_of_its_rows_among_all_rows() -> None:
    features = drawn()
    sample = np.array([0, 3, 150, 298, 299])
    found = pair_of(features, sample).mutual_knn(UNKNOWN, k=K, resamples=0, seed=0)
    shares = MutualKnn(*(nearest_others(side, K) for side in features)).of_rows()
    assert len(set(shares[sample])) > 1
    assert found.value == pytest.approx(shares[sample].mean())


def test_the_null_by_formula_is_the_mean_over_shuffles() -> None:
    features = drawn()
    pair = pair_of(features, np.arange(20))
    near = [nearest_others(side, K) for side in features]
    for measure, expected in (
        (LinearCka(*features), mean_shuffled_cka(pair.moments)),
        (LinearCka(*features, debiased=True), mean_shuffled_cka(pair.moments, debiased=True)),
        (Svcca(*features, dims=3), mean_shuffled_svcca(ROWS, dims=3)),
        (MutualKnn(*near), pair.mutual_knn(UNKNOWN, k=K, resamples=0, seed=0).null_mean),
    ):
        null = permutation_null(measure, ROWS, permutations=400, seed=0)
        assert expected == pytest.approx(null.mean(), abs=4 * null.std() / 20)
        assert null.std() / 20 < 0.003


@pytest.mark.parametrize("name", ["cka", "mutual_knn"])
def test_intervals_are_as_wide_as_values_of_new_data_vary(name: str) -> None:
    values, widths = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        first = generator.standard_normal((640, 4))
        features = first, first + 0.7 * generator.standard_normal((640, 4))
        pair = pair_of(features, np.sort(generator.choice(640, 160, replace=False)))
        if name == "cka":
            found = pair.cka(
                calibrate(LinearCka, pair.features, permutations=0, subsamples=40, seed=0)
            )
        else:
            found = pair.mutual_knn(UNKNOWN, k=K, resamples=300, seed=0)
        assert found.interval is not None
        assert found.interval[0] < found.value < found.interval[1]
        values.append(found.value)
        widths.append(found.interval[1] - found.interval[0])
    expected = 2 * 1.96 * np.std(values)
    assert 0.7 * expected < np.mean(widths) < 1.5 * expected


def test_what_compares_all_with_all_is_taken_on_the_held_pairs_and_says_so() -> None:
    features = drawn()
    found = {each.name: each for each in values_of(features, alignment_held=60)}
    assert {name: each.n for name, each in found.items()} == {
        "cka": ROWS,
        "cka_debiased": ROWS,
        "svcca": ROWS,
        "mutual_knn": 60,
        "cknna": 60,
    }
    generator = np.random.default_rng(AlignmentSettings().seed)
    generator.choice(np.arange(ROWS), ROWS, replace=False)
    sample = np.sort(generator.choice(ROWS, 60, replace=False))
    near = [nearest_others(side[sample], K) for side in features]
    assert found["cknna"].calibrated.value == pytest.approx(Cknna(*near)())
    assert found["cka"].calibrated.value == pytest.approx(LinearCka(*features)())
    assert found["mutual_knn"].protocol["queries"] == "60 of the rows, asked among all"
    assert found["mutual_knn"].calibrated.null_mean == K / (ROWS - 1)
    assert found["cknna"].protocol["rows"] == "60 of 300, drawn with seed 0"
    assert found["cka"].protocol["rows"] == "300 of 300, drawn with seed 0"
    assert "60" in str(found["cka"].protocol["null"])


def test_pairs_that_are_all_held_are_measured_as_ever() -> None:
    features = drawn(60)
    for each in values_of(features, alignment_held=60):
        assert each.n == 60
        assert "null" not in each.protocol
        assert each.protocol["interval"] == "Student's t, 20 halves of the rows"
