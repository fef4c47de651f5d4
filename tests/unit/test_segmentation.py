"""Segmentation: IoU worked out by hand, its interval, the windows, synonyms, whole pictures."""

import numpy as np
import pytest
import torch

from evaluate.measures.segmentation import class_colours, hex_colour, overlay
from evaluate.segmentation import (
    Areas,
    Names,
    Sliding,
    fit_size,
    mean_iou,
    pixel_confusion,
    segment,
    window_starts,
)
from features.errors import EvaluationError
from tests import tiny

MASK = np.array([[0, 0, 1], [1, 1, -1]])
TAKEN = np.array([[0, 1, 1], [1, 0, 2]])


def areas(*confusions: list[list[int]]) -> Areas:
    stacked = np.array(confusions)
    right = np.diagonal(stacked, axis1=1, axis2=2)
    return Areas(right, stacked.sum(axis=2), stacked.sum(axis=1))


def test_iou_is_the_one_worked_out_by_hand_and_pixels_left_open_do_not_count() -> None:
    confusion = pixel_confusion(MASK, TAKEN, 3)
    assert confusion.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    # Class 0: 1 right of 2 + 2 - 1; class 1: 2 of 3 + 3 - 2; class 2 occurs only where left open.
    iou = areas(confusion.tolist()).iou()
    np.testing.assert_allclose(iou, [1 / 3, 1 / 2, np.nan])
    assert mean_iou(iou) == pytest.approx(5 / 12)


def test_iou_is_of_the_sums_over_the_pictures_and_no_mean_of_theirs() -> None:
    found = areas([[1, 0], [0, 0]], [[0, 9], [0, 1]])
    np.testing.assert_allclose(found.iou(), [1 / 10, 1 / 10])


def test_a_class_that_is_only_predicted_lowers_the_mean() -> None:
    confusion = pixel_confusion(np.array([0, 0]), np.array([0, 1]), 2)
    assert mean_iou(areas(confusion.tolist()).iou()) == pytest.approx(1 / 4)


def test_nothing_but_open_pixels_has_no_score() -> None:
    confusion = pixel_confusion(np.array([-1]), np.array([0]), 2)
    assert np.isnan(mean_iou(areas(confusion.tolist()).iou()))


def test_the_baselines_are_those_worked_out_by_hand() -> None:
    found = areas([[30, 0], [0, 10]])
    # All pixels class 0: 30 of 40, and none of class 1.
    assert found.majority_class() == pytest.approx((3 / 4 + 0) / 2)
    # Half of the pixels at random: 15 of 30 + 20 - 15, and 5 of 10 + 20 - 5.
    assert found.random_class() == pytest.approx((15 / 35 + 5 / 25) / 2)


def test_what_guessing_scores_is_what_guessing_scores() -> None:
    random = np.random.default_rng(0)
    labels = random.choice(3, 200_000, p=[0.7, 0.2, 0.1])
    confusion = pixel_confusion(labels, random.integers(0, 3, len(labels)), 3)
    found = areas(confusion.tolist())
    assert mean_iou(found.iou()) == pytest.approx(found.random_class(), abs=0.003)


def test_the_interval_draws_pictures_and_holds_the_value() -> None:
    alike = areas(*([[[3, 1], [1, 5]]] * 20))
    whole, each = alike.intervals(resamples=100, seed=0)
    value = mean_iou(alike.iou())
    assert whole == pytest.approx((value, value))  # every draw of equal pictures is the same
    mixed = areas(*([[[4, 0], [0, 4]]] * 10), *([[[0, 4], [4, 0]]] * 10))
    whole, each = mixed.intervals(resamples=500, seed=0)
    # Half of the pictures right: IoU 1/3. The share p of right ones has a deviation of 0.11, and
    # IoU is p / (2 - p): 0.28 / 1.72 and 0.72 / 1.28 are 1.96 deviations away.
    assert whole == pytest.approx((0.28 / 1.72, 0.72 / 1.28), abs=0.06)
    assert each[0] == whole


def test_a_class_without_pixels_and_no_resamples_have_no_interval() -> None:
    found = areas([[4, 0, 0], [0, 4, 0], [0, 0, 0]])
    assert found.intervals(resamples=10, seed=0)[1][2] is None
    assert found.intervals(resamples=0, seed=0) == (None, [None] * 3)


def test_a_label_beyond_the_classes_and_a_mask_of_another_size_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"label 7\. Labels from 0 to 1, or -1"):
        pixel_confusion(np.array([0, 7]), np.array([0, 1]), 2)
    with pytest.raises(EvaluationError, match=r"shape \(2,\), its prediction \(3,\)"):
        pixel_confusion(np.array([0, 1]), np.array([0, 1, 1]), 2)


def test_the_last_window_ends_at_the_border() -> None:
    assert window_starts(900, 448, 224) == [0, 224, 448, 452]
    assert window_starts(896, 448, 224) == [0, 224, 448]
    assert window_starts(300, 448, 224) == [0]
    with pytest.raises(EvaluationError, match="stride of the windows is 500"):
        window_starts(900, 448, 500)


@pytest.mark.parametrize("extent", range(300, 2049, 97))
def test_the_windows_are_those_of_mmsegmentation(extent: int) -> None:
    # Its grid, by its formula: one window more than whole strides, each pushed back to the border.
    number = max(extent - 448 + 224 - 1, 0) // 224 + 1
    ends = [min(224 * place + 448, extent) for place in range(number)]
    assert window_starts(extent, 448, 224) == [max(end - 448, 0) for end in ends]


def test_the_ratio_is_kept_within_both_bounds() -> None:
    assert fit_size(360, 480) == (448, 597)
    assert fit_size(100, 1000) == (205, 2048)


def mean_colours(windows: torch.Tensor) -> torch.Tensor:
    """An encoder whose feature is the mean colour of each patch of 4 × 4 pixels."""
    return torch.nn.functional.avg_pool2d(windows, 4).permute(0, 2, 3, 1)


def two_halves() -> torch.Tensor:
    image = torch.zeros(3, 18, 26)
    image[0, :, :12], image[1, :, 12:] = 1, 1
    return image


@pytest.mark.parametrize("crop", [8, 12, 64])
@pytest.mark.parametrize("at_once", [1, 16])
def test_two_halves_of_two_colours_are_told_apart_in_any_window(crop: int, at_once: int) -> None:
    names = Names(5 * torch.eye(3)[:2], torch.tensor([0, 1]))
    sliding = Sliding(crop, 4, 4, at_once)
    taken = segment(two_halves(), mean_colours, names, sliding, (18, 26))
    assert not taken[:, :12].any()
    assert taken[:, 12:].all()
    larger = segment(two_halves(), mean_colours, names, sliding, (36, 52))
    assert (larger[:, :24] == 0).all()
    assert (larger[:, 24:] == 1).all()


def test_a_class_takes_the_nearest_of_its_names_however_many_are_looked_at_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blue, red, green = torch.eye(3)[[2, 0, 1]]
    names = Names(torch.stack([blue, green, red]), torch.tensor([0, 1, 0]))
    sliding = Sliding(8, 4, 4)
    together = segment(two_halves(), mean_colours, names, sliding, (18, 26))
    assert (together[:, :12] == 0).all()
    assert (together[:, 12:] == 1).all()
    monkeypatch.setattr("evaluate.segmentation.COSINES_AT_ONCE", 1)
    assert torch.equal(segment(two_halves(), mean_colours, names, sliding, (18, 26)), together)


def test_overlapping_windows_count_with_their_mean() -> None:
    calls = iter([0.0, 1.0])

    def by_window(windows: torch.Tensor) -> torch.Tensor:
        towards = torch.tensor([[next(calls), 1.0]])
        return towards.expand(1, 1, 1, 2)

    # Two windows of 4 pixels overlap by 2: the first sees name 1 at cosine 1, the second both at
    # 0.71. Name 0 has at most 0.71 there, so name 1 wins but where the second is alone: a tie.
    names = Names(torch.eye(2), torch.tensor([0, 1]))
    taken = segment(torch.zeros(3, 4, 6), by_window, names, Sliding(4, 2, 4, 1), (4, 6))
    assert taken[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_an_embedding_that_is_not_a_number_is_refused() -> None:
    names = Names(torch.full((1, 3), torch.nan), torch.tensor([0]))
    with pytest.raises(EvaluationError, match="is not a number"):
        segment(torch.ones(3, 8, 8), mean_colours, names, Sliding(8, 4, 4), (8, 8))


def test_classes_have_colours_of_their_own_that_are_painted_where_they_are() -> None:
    colours = class_colours(171)
    assert len({hex_colour(colour) for colour in colours}) == 171
    labels = np.full((40, 30), -1)
    labels[:20] = 3
    assert overlay(tiny.picture(0, 30, 40), labels, colours).startswith("data:image/jpeg;base64,")
