"""Bootstrap intervals: against the formula of the binomial, and where there is nothing to draw."""

import numpy as np
import pytest

from evaluate.results import Items
from evaluate.statistics import interval_of


def test_the_interval_of_a_proportion_is_that_of_the_binomial() -> None:
    hits = np.array([1] * 300 + [0] * 700)
    interval = interval_of(Items(hits), resamples=4000, seed=0)
    error = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert interval == pytest.approx((0.3 - error, 0.3 + error), abs=0.003)


def test_captions_of_one_image_are_drawn_together() -> None:
    # All five captions of an image are right or all wrong: as uncertain as one caption each.
    hits, counts = np.array([5, 0] * 100), np.full(200, 5)
    together = interval_of(Items(hits, counts), resamples=4000, seed=0)
    single = interval_of(Items(hits // 5), resamples=4000, seed=0)
    assert together == pytest.approx(single, abs=0.01)


def test_it_equals_the_bootstrap_that_draws_item_by_item() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 4, 60)
    hits = generator.integers(0, counts + 1)
    drawn = generator.integers(0, 60, (20_000, 60))
    ratios = hits[drawn].sum(1) / counts[drawn].sum(1)
    expected = tuple(np.quantile(ratios, [0.025, 0.975]))
    assert interval_of(Items(hits, counts), resamples=20_000, seed=1) == pytest.approx(
        expected, abs=0.01
    )


def test_the_mean_per_class_is_drawn_over_images() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 90)
    correct = generator.random(90) < 0.6
    drawn = generator.integers(0, 90, (4000, 90))
    means = [
        np.mean([correct[row][labels[row] == c].mean() for c in np.unique(labels[row])])
        for row in drawn
    ]
    expected = tuple(np.quantile(means, [0.025, 0.975]))
    found = interval_of(Items(correct.astype(int), classes=labels), resamples=8000, seed=1)
    assert found == pytest.approx(expected, abs=0.01)


def test_a_seed_gives_the_same_interval_again() -> None:
    hits = np.array([1, 0, 0, 1, 1])
    assert interval_of(Items(hits), resamples=50, seed=3) == interval_of(
        Items(hits), resamples=50, seed=3
    )


def test_there_is_no_interval_without_items_or_resamples() -> None:
    assert interval_of(Items(np.empty(0, dtype=int)), resamples=10, seed=0) is None
    assert interval_of(Items(np.array([1, 0])), resamples=0, seed=0) is None


def test_many_classes_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.statistics.DRAWS_AT_ONCE", 100)
    labels = np.repeat(np.arange(40), 5)
    low, high = interval_of(Items(1 - labels % 2, classes=labels), resamples=200, seed=0) or (0, 0)
    assert low < 0.5 < high
