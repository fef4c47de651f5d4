"""The linear probe: it converges, chooses on held-out rows, and predicts."""

import numpy as np
import pytest

from evaluate.linear_probe import fit_linear_probe


def classes(rows: int, dim: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((3, dim))
    labels = generator.integers(0, 3, rows)
    features: np.ndarray = centres[labels] + noise * generator.standard_normal((rows, dim))
    return features, labels


def every_fifth(rows: int) -> np.ndarray:
    chosen: np.ndarray = np.arange(rows) % 5 == 0
    return chosen


def test_classes_that_are_apart_are_told_apart_wherever_the_origin_is() -> None:
    features, labels = classes(300, 8, 0.2)
    probe = fit_linear_probe(features * 1e-3 + 4, labels, every_fifth(300))
    test, expected = classes(200, 8, 0.2, seed=1)
    assert probe.converged
    assert (probe.predict(test * 1e-3 + 4) == expected).mean() > 0.99


def test_the_regularisation_is_the_strongest_of_the_best_on_held_out_rows() -> None:
    features, labels = classes(600, 200, 6.0)  # many dimensions, much noise
    probe = fit_linear_probe(features, labels, every_fifth(600), regularisations=[1e-6, 1.0, 2.0])
    best = max(probe.held_out.values())
    assert probe.regularisation == max(r for r, value in probe.held_out.items() if value == best)
    assert probe.held_out[1.0] > probe.held_out[1e-6]


def test_no_held_out_rows_are_refused() -> None:
    features, labels = classes(20, 4, 1.0)
    with pytest.raises(ValueError, match="0 of 20 rows are held out"):
        fit_linear_probe(features, labels, np.zeros(20, dtype=bool))
