"""Average precision by hand, and the files that say which classes a picture shows."""

from pathlib import Path

import numpy as np
import pytest

from evaluate.measures.multi_label import ClassFiles, average_precision, rank_pictures
from features.errors import EvaluationError


def written(folder: Path, **texts: str) -> ClassFiles:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return ClassFiles(str(folder / "*.txt"))


def test_average_precision_by_hand() -> None:
    order, shown = np.array([2, 0, 1, 3]), np.array([True, False, True, False])
    once = np.ones((1, 4), dtype=np.int64)
    whole, eleven = average_precision(order, shown, once)[0]
    assert whole == pytest.approx((1 + 2 / 3) / 2)
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_picture_without_the_class_goes_before_one_as_near_and_some_are_left_out() -> None:
    cosines = np.array([0.5, 0.5, 0.9, 0.5 + 5e-7, np.nan])
    order, shown = rank_pictures(cosines, np.array([1, -1, 0, 1, 1], dtype=np.int8))
    assert order.tolist() == [1, 3, 0, 4]
    assert shown.tolist() == [False, True, True, True]


def test_a_resample_without_a_picture_of_the_class_has_no_precision() -> None:
    order, shown = np.array([0, 1]), np.array([True, False])
    drawn = average_precision(order, shown, np.array([[2, 0], [0, 2], [1, 1]]))
    assert np.isnan(drawn[:, 0]).tolist() == [False, True, False]
    assert np.isnan(drawn[:, 1]).tolist() == [False, True, False]


def test_the_lists_of_voc_are_read(tmp_path: Path) -> None:
    files = written(tmp_path, dog_test="000001 -1\n000002  1\n", car_test="000002 -1\n000001  0\n")
    pictures, classes, marks = files.read()
    assert (pictures, classes) == (["000002", "000001"], ["car", "dog"])
    assert marks.tolist() == [[-1, 1], [0, -1]]
    before = files.version()
    assert written(tmp_path, dog_test="000001 1\n000002  1\n").version() != before


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"dog": "1 2\n"}, r"Line 1 of the marks of 'dog' .* is '1 2'"),
        ({"dog": "1\n"}, r"Line 1 of the marks of 'dog'"),
        ({"dog_test": "1 1\n", "dog_val": "2 1\n"}, r"The same pictures in each file"),
        ({}, r"eval\.multi_label names .* which cannot be read"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        written(tmp_path, **texts).read()
