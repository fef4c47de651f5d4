"""Held-out recall, worked out by hand on embeddings that are put in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.columns import Columns
from align.config import AlignConfig
from align.heads import AlignmentModel
from align.heldout import HeldOut, HeldOutRows, _ranks
from align.loss import Pairs
from tests.feature_stores import IMAGE, TEXT, make_store


def ranks(image: Tensor, text: Tensor, pairs: Pairs) -> tuple[list[int], list[int]]:
    by_image, by_text = _ranks(F.normalize(image, dim=-1), F.normalize(text, dim=-1), pairs)
    return by_image.tolist(), by_text.tolist()


def own(fields: int, images: int) -> Pairs:
    return Pairs(fields, torch.ones(fields * images), None)


def test_embeddings_that_match_are_all_nearest() -> None:
    image = torch.eye(4)
    assert ranks(image, image.repeat_interleave(2, dim=0), own(2, 4)) == ([0] * 4, [0] * 8)


def test_an_image_is_right_by_its_nearest_caption_and_each_caption_counts_for_itself() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 1.0], [0.2, 1.0]])
    assert ranks(image, text, own(2, 2)) == ([0, 0], [0, 1, 0, 0])


def test_a_wrong_one_that_is_equally_near_counts_as_nearer() -> None:
    same = torch.ones(3, 2)
    assert ranks(same, same, own(1, 3)) == ([2, 2, 2], [2, 2, 2])


def test_equal_captions_tie_however_their_products_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    image, caption = torch.randn(7, 5, generator=generator), torch.randn(1, 5, generator=generator)
    assert ranks(image, caption.expand(7, 5), own(1, 7))[0] == [6] * 7
    assert ranks(caption.expand(7, 5), image, own(1, 7))[1] == [6] * 7


def test_embeddings_that_are_not_numbers_are_never_right() -> None:
    broken = torch.full((3, 2), torch.nan)
    assert ranks(broken, broken, own(1, 3)) == ([2, 2, 2], [2, 2, 2])


def test_a_caption_with_the_same_words_is_right_as_well() -> None:
    same = torch.ones(3, 2)
    ids = torch.tensor([[7], [7], [9]])
    by_image, by_text = ranks(same, same, Pairs(1, torch.ones(3), ids))
    assert by_image == [1, 1, 2]
    assert by_text == [1, 1, 2]


def test_a_caption_that_cannot_be_used_competes_with_none() -> None:
    image = torch.eye(2)
    text = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    pairs = Pairs(2, torch.tensor([1.0, 1.0, 1.0, 0.0]), None)
    assert ranks(image, text, pairs)[0] == [0, 0]


def test_scores_do_not_depend_on_the_type_of_the_matrix_products(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=2000)
    columns = Columns.open(store, AlignConfig(fields=("bare",)), IMAGE, TEXT)
    columns = replace(columns, text=(columns.image,))  # each image is its own caption
    rows = HeldOutRows(columns, np.arange(2000), np.ones((2000, 1), dtype=bool))
    heldout = HeldOut([rows], identical=False, device=torch.device("cpu"))
    model = AlignmentModel(nn.Identity(), nn.Identity(), log_scale=0.0, bias=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        scores = heldout.score(model)
    assert scores["recall@1"] > 0.99
    assert scores == heldout.score(model)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(7, 4, generator=generator)
    text = torch.randn(14, 4, generator=generator)
    expected = ranks(image, text, own(2, 7))
    monkeypatch.setattr("align.heldout.BLOCK_ROWS", block)
    assert ranks(image, text, own(2, 7)) == expected
