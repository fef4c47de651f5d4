"""What the paper says predicts alignment, from its published points.

Zhang et al. 2025, arXiv:2412.04616, figures of alignment probing. The points are read off the
figures, to a tenth: the mean of both recalls at 10 that a linear probe reaches, over what the
frozen encoder scores.
"""

import numpy as np
import pytest

from evaluate.statistics import Correlation, correlate

IMAGE = {  # ImageNet k-NN, ImageNet linear probe, recall@10 of alignment probing; per cent
    "MAE-B": (46.2, 68.0, 6.6),
    "MAE-L": (47.1, 75.8, 9.0),
    "MAE-H": (49.4, 76.6, 11.1),
    "DINO-RN50": (67.5, 75.3, 50.2),
    "I-JEPA-H": (71.1, 79.3, 46.3),
    "AIM-B": (75.0, 78.5, 57.3),
    "DINO-B": (76.1, 80.1, 52.3),
    "iBOT-B": (77.1, 79.5, 55.4),
    "iBOT-L": (78.0, 82.3, 57.5),
    "AIM-L": (79.7, 80.6, 62.9),
    "DINOv2-B": (82.1, 84.5, 67.7),
    "DINOv2-L": (83.5, 86.3, 70.1),
    "DINOv2-G": (83.5, 86.5, 72.9),
}
TEXT = {  # average over MTEB, recall@10
    "gte-small": (61.4, 65.2),
    "gte-base": (64.1, 67.8),
    "gte-large": (65.4, 70.2),
    "gte-Qwen2-1.5B": (67.2, 71.0),
    "NV-Embed-v2": (72.3, 78.1),
}
KNN, LINEAR, RECALL = np.array(list(IMAGE.values())).T
MTEB, TEXT_RECALL = np.array(list(TEXT.values())).T
READ_OFF = 1e-3  # what a tenth in the points may change
WITHOUT_MAE = np.array([not name.startswith("MAE") for name in IMAGE])


def correlation(first: np.ndarray, second: np.ndarray) -> Correlation:
    found = correlate(first, second, resamples=200, seed=0)
    assert found is not None
    return found


def test_nearest_neighbours_predict_alignment_as_the_paper_says() -> None:
    assert correlation(KNN, RECALL).pearson == pytest.approx(0.991, abs=READ_OFF)


def test_mteb_predicts_alignment_as_the_paper_says() -> None:
    assert correlation(MTEB, TEXT_RECALL).pearson == pytest.approx(0.994, abs=READ_OFF)


def test_the_linear_probe_comes_to_a_little_less_than_the_paper_says() -> None:
    # The paper says 0.847. Its own points give 0.836, more than reading them off can explain.
    assert correlation(LINEAR, RECALL).pearson == pytest.approx(0.836, abs=READ_OFF)


def test_the_lead_of_nearest_neighbours_over_the_probe_is_mostly_that_of_three_mae_models() -> None:
    recall = RECALL[WITHOUT_MAE]
    assert correlation(KNN[WITHOUT_MAE], recall).pearson == pytest.approx(0.914, abs=READ_OFF)
    assert correlation(LINEAR[WITHOUT_MAE], recall).pearson == pytest.approx(0.868, abs=READ_OFF)


def test_the_intervals_of_ten_models_do_not_tell_the_two_measures_apart() -> None:
    recall = RECALL[WITHOUT_MAE]
    low, _ = correlation(KNN[WITHOUT_MAE], recall).pearson_interval
    _, high = correlation(LINEAR[WITHOUT_MAE], recall).pearson_interval
    assert low < high


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    tied = np.round(KNN, -1)
    found = correlation(tied, RECALL)
    assert found.spearman == pytest.approx(float(stats.spearmanr(tied, RECALL).statistic))


def test_leaving_a_point_out_is_the_correlation_of_the_others() -> None:
    found = correlation(LINEAR, RECALL)
    assert len(found.without_one) == found.n == 13
    assert found.without_one[0] == pytest.approx(np.corrcoef(LINEAR[1:], RECALL[1:])[0, 1])


def test_a_measure_that_is_the_same_for_all_is_not_correlated() -> None:
    assert correlate(np.ones(5), np.arange(5.0), resamples=10, seed=0) is None
    assert correlate(np.arange(3.0), np.arange(3.0), resamples=10, seed=0) is None
