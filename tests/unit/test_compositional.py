"""Compositional scores by hand: what is right, what a tie is, which rows make a group."""

import numpy as np
import pytest

from evaluate.measures.compositional import (
    CHANCE,
    Compositional,
    choose_captions,
    compare_groups,
    pair_rows,
    tell_texts_apart,
)


def scored(*cosines: float) -> dict[str, bool]:
    found = Compositional(np.array(cosines).reshape(1, 2, 2))
    return {name: bool(hits[0]) for name, hits in found.hits().items()}


def scores(text: bool, image: bool, group: bool) -> dict[str, bool]:
    return {"text_score": text, "image_score": image, "group_score": group}


def test_all_four_choices_right_scores_everything() -> None:
    assert scored(0.9, 0.1, 0.2, 0.8) == scores(True, True, True)


def test_each_image_may_find_its_caption_while_a_caption_prefers_the_wrong_image() -> None:
    # Rows are images: image 0 likes its caption (0.3 > 0.2), but caption 0 likes image 1 (0.5).
    assert scored(0.3, 0.2, 0.5, 0.6) == scores(True, False, False)


def test_each_caption_may_find_its_image_while_an_image_prefers_the_wrong_caption() -> None:
    assert scored(0.3, 0.5, 0.2, 0.6) == scores(False, True, False)


def test_a_tie_is_wrong() -> None:
    assert scored(0.5, 0.5, 0.5, 0.5) == scores(False, False, False)


def test_a_cosine_that_is_not_a_number_is_wrong() -> None:
    assert scored(np.nan, 0.1, 0.2, 0.8) == scores(False, False, False)


def test_equal_captions_tie_whatever_the_images() -> None:
    generator = np.random.default_rng(0)
    image = generator.standard_normal((100, 7)).astype(np.float32)
    text = np.repeat(generator.standard_normal((50, 7)).astype(np.float32), 2, axis=0)
    found = compare_groups(image, text, np.arange(100).reshape(50, 2))
    assert not found.text.any()


def test_random_cosines_score_what_chance_says() -> None:
    found = Compositional(np.random.default_rng(0).random((200_000, 2, 2)))
    for name, hits in found.hits().items():
        assert hits.mean() == pytest.approx(CHANCE[name], abs=0.004)


def test_the_length_of_embeddings_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    image, text = generator.standard_normal((2, 6, 4))
    pairs = np.arange(6).reshape(3, 2)
    lengths = np.arange(1, 7)[:, None]
    expected = compare_groups(image, text, pairs).cosines
    assert compare_groups(image * lengths, text / lengths, pairs).cosines == pytest.approx(expected)


def test_the_first_caption_must_be_nearer_than_every_other() -> None:
    image = np.array([[1.0, 0.0]] * 4)
    near, far, same = [2.0, 0.1], [0.1, 2.0], [0.1, 2.0]
    text = np.array([[near, far, far], [far, near, far], [near, far, near], [far, same, same]])
    assert choose_captions(image, text).tolist() == [True, False, False, False]


def test_a_caption_that_is_not_a_number_is_not_chosen() -> None:
    text = np.array([[[np.nan, 0.0], [1.0, 0.0]], [[1.0, 0.0], [np.nan, 0.0]]])
    assert choose_captions(np.ones((2, 2)), text).tolist() == [False, False]


def test_all_right_captions_must_be_nearer_than_every_wrong_one() -> None:
    image = np.array([[1.0, 0.0]] * 3)
    near, nearer, far = [2.0, 0.5], [2.0, 0.1], [0.1, 2.0]
    text = np.array([[near, nearer, far], [near, far, nearer], [nearer, far, near]])
    assert choose_captions(image, text, right=2).tolist() == [True, False, False]
    assert choose_captions(image, text).tolist() == [False, False, True]


def test_right_captions_must_be_nearer_to_each_other_than_to_the_wrong_one() -> None:
    one, alike, other = [2.0, 0.5], [2.0, 0.1], [0.1, 2.0]
    text = np.array([[one, alike, other], [one, other, alike], [other, one, alike], [one] * 3])
    assert tell_texts_apart(text, right=2).tolist() == [True, False, False, False]


def test_groups_are_pairs_of_rows_wherever_they_stand() -> None:
    groups = np.array([7, -1, 3, 7, 3, 5, 9, 9, 9], dtype=np.int32)
    pairs, left_out = pair_rows(groups, np.ones(9, dtype=bool))
    assert pairs.tolist() == [[0, 3], [2, 4]]
    assert left_out == 2  # 5 has one row, 9 has three


def test_a_group_with_a_row_that_cannot_be_used_is_left_out_and_counted() -> None:
    usable = np.array([True, True, False, True])
    pairs, left_out = pair_rows(np.array([0, 0, 1, 1], dtype=np.int32), usable)
    assert pairs.tolist() == [[0, 1]]
    assert left_out == 1
