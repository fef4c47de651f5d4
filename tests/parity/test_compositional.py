"""The definitions of Winoground, SugarCrepe and ARO on every order and tie of the scores."""

from itertools import product

import numpy as np

from evaluate.measures.compositional import Compositional, choose_captions

SCORES = list(product(range(4), repeat=4))
"""c0_i0, c1_i0, c0_i1, c1_i1: caption and image, as its authors name them."""


def text_correct(c0_i0: int, c1_i0: int, c0_i1: int, c1_i1: int) -> bool:
    """Equation 1 of Thrush et al. 2022."""
    return c0_i0 > c1_i0 and c1_i1 > c0_i1


def image_correct(c0_i0: int, c1_i0: int, c0_i1: int, c1_i1: int) -> bool:
    """Equation 2."""
    return c0_i0 > c0_i1 and c1_i1 > c1_i0


def test_scores_of_every_order_and_tie_are_those_of_the_definition() -> None:
    # Row i of a group is image i, column j is caption j.
    found = Compositional(np.array(SCORES, dtype=np.float64).reshape(-1, 2, 2)).hits()
    text = [text_correct(*scores) for scores in SCORES]
    image = [image_correct(*scores) for scores in SCORES]
    assert found["text_score"].tolist() == text
    assert found["image_score"].tolist() == image
    assert found["group_score"].tolist() == [a and b for a, b in zip(text, image, strict=True)]
    assert any(len(set(scores)) < 4 for scores in SCORES)


def test_a_choice_of_one_caption_is_that_of_sugarcrepe_and_of_aro() -> None:
    grid = np.linspace(0, 1.5, 4)  # of the angle of a caption to its image
    angles = np.array(list(product(grid, repeat=2)))  # (choices, 2): right and wrong
    text = np.stack([np.cos(angles), np.sin(angles)], axis=-1)  # (choices, captions, 2)
    found = choose_captions(np.tile([1.0, 0.0], (len(angles), 1)), text).tolist()
    cosines = np.cos(angles)
    # main_eval.py of SugarCrepe asks for `pos_score > neg_score`; aro_datasets.py of ARO puts the
    # wrong caption first and asks for argmax == 1.
    assert found == [right > wrong for right, wrong in cosines]
    assert found == [np.argmax([wrong, right]) == 1 for right, wrong in cosines]
    assert sum(found) == 6  # of 16, four of which tie
