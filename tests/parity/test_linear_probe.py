"""The linear probe against scikit-learn, where that is installed."""

import numpy as np
import pytest

from evaluate.linear_probe import fit_linear_probe


@pytest.mark.parametrize("regularisation", [1e-4, 1e-2])
def test_accuracy_is_that_of_scikit_learn_within_a_fifth_of_a_point(regularisation: float) -> None:
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="scikit-learn is not installed"
    )
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((5, 24))
    labels = generator.integers(0, 5, 4000)
    features = centres[labels] + 2.5 * generator.standard_normal((4000, 24))
    train, test = slice(0, 2000), slice(2000, 4000)
    probe = fit_linear_probe(
        features[train],
        labels[train],
        np.arange(2000) % 10 == 0,
        regularisations=[regularisation],
    )
    mean, scale = probe.mean.numpy(), probe.scale
    reference = linear_model.LogisticRegression(
        C=1 / (regularisation * 2000), max_iter=1000, tol=1e-8
    ).fit((features[train] - mean) / scale, labels[train])
    expected = reference.predict((features[test] - mean) / scale)
    found = probe.predict(features[test])
    assert 0.3 < np.mean(expected == labels[test]) < 0.95  # hard enough to tell
    assert abs(np.mean(found == labels[test]) - np.mean(expected == labels[test])) <= 0.002
    assert (
        np.abs(probe.weight.numpy() - reference.coef_).max() < 0.05 * np.abs(reference.coef_).max()
    )
