"""Scores against hubness: as numpy has them, on a hub made by hand, and without a bank."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from align.heldout import Relevance, retrieval_ranks
from evaluate.config import Score
from evaluate.hubness import NEIGHBOURS, Bank
from evaluate.measures.measure import Splits
from evaluate.measures.retrieval import Retrieval, RetrievalSettings
from evaluate.nearest import nearest_by_score, nearest_neighbours
from features.errors import EvaluationError
from pipeline.cli.use import search

SCALE = 12.0
RETRIEVAL = Retrieval()


def units(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def test_offsets_are_what_the_papers_say() -> None:
    image, text, gallery = units(300, 0), units(400, 1), units(7, 2)
    bank = Bank(image, text)
    by_text, by_image = (gallery @ each.T for each in (text, image))
    k = NEIGHBOURS
    expected = {
        ("csls", "text"): np.sort(by_text.numpy(), axis=1)[:, -k:].mean(axis=1) / 2,
        ("csls", "image"): np.sort(by_image.numpy(), axis=1)[:, -k:].mean(axis=1) / 2,
        ("inverted-softmax", "text"): np.log(np.exp(SCALE * by_text.numpy()).mean(axis=1)) / SCALE,
        ("dual-bank", "text"): np.log(
            np.exp(SCALE * torch.cat([by_text, by_image], dim=1).numpy()).mean(axis=1)
        )
        / SCALE,
    }
    for (score, kind), offsets in expected.items():
        found = bank.offsets(score, gallery, asked_by=kind, scale=SCALE)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.numpy(), offsets, atol=1e-6)


def test_a_bank_smaller_than_the_neighbours_counts_whole() -> None:
    image, text, gallery = units(3, 0), units(2, 1), units(4, 2)
    found = Bank(image, text).offsets("csls", gallery, asked_by="image", scale=SCALE)
    np.testing.assert_allclose(found, (gallery @ image.T).mean(dim=1) / 2, atol=1e-6)


@pytest.mark.parametrize("words", [None, torch.arange(2)])
def test_an_item_near_to_every_query_no_longer_wins(words: torch.Tensor | None) -> None:
    # Caption 0 is near to both images (a hub); caption 1 is that of image 1, and a little farther.
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), dim=-1)
    text = F.normalize(torch.tensor([[0.8, 0.55], [0.2, 0.98]]), dim=-1)
    relevance = Relevance(2, torch.tensor([0, 1]), words)
    assert retrieval_ranks(image, text, relevance).by_image.tolist() == [0, 1]
    bank = Bank(image, text)
    offsets = (
        bank.offsets("csls", image, asked_by="text", scale=SCALE),
        bank.offsets("csls", text, asked_by="image", scale=SCALE),
    )
    ranks = retrieval_ranks(image, text, relevance, offsets)
    assert ranks.by_image.tolist() == [0, 0]
    # Each way only the searched items' offsets count: those of images alone change no by_image.
    only = retrieval_ranks(image, text, relevance, (offsets[0], torch.zeros(2)))
    assert only.by_image.tolist() == [0, 1]
    assert only.by_text.tolist() == ranks.by_text.tolist()


@pytest.mark.parametrize("words", [False, True])
def test_ranks_with_offsets_are_those_of_the_whole_matrix(words: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    image, text = units(20, 4), units(60, 5)
    owner = torch.arange(20).repeat_interleave(3)
    offsets = (torch.rand(20, generator=generator), torch.rand(60, generator=generator))
    relevance = Relevance(20, owner, torch.arange(60) if words else None)
    ranks = retrieval_ranks(image, text, relevance, offsets)
    right = owner == torch.arange(20)[:, None]
    for scores, axis, found in (
        (image @ text.T - offsets[1], 1, ranks.by_image),
        (image @ text.T - offsets[0][:, None], 0, ranks.by_text),
    ):
        best = scores.masked_fill(~right, -9).amax(dim=axis, keepdim=True)
        assert ((scores > best - 1e-6) & ~right).sum(dim=axis).tolist() == found.tolist()


def test_rows_by_score_are_those_of_all_scores_sorted() -> None:
    rows, query = units(50, 6).numpy(), units(1, 7).numpy()
    offsets = np.linspace(0.5, 0, 50, dtype=np.float32)
    scores = rows @ query[0] - offsets
    found = nearest_by_score(query, iter([rows[:20], rows[20:]]), offsets, 9)
    assert found.rows[0].tolist() == np.argsort(-scores)[:9].tolist()
    np.testing.assert_allclose(found.cosines[0], (rows @ query[0])[found.rows[0]], atol=1e-6)
    plain = nearest_by_score(query, iter([rows]), np.zeros(50, dtype=np.float32), 9)
    assert plain.rows.tolist() == nearest_neighbours(query, iter([rows]), 9).rows.tolist()


@pytest.mark.parametrize("score", get_args(Score))
def test_a_score_without_rows_of_the_training_is_refused(score: Score) -> None:
    settings = RetrievalSettings(retrieval_scores=(score,))
    with pytest.raises(EvaluationError, match=f"has '{score}', whose bank is rows of the training"):
        RETRIEVAL.splits(settings, Splits({}, ("train",)))
    settings = RetrievalSettings(retrieval_scores=("inverted-softmax-transductive",))
    assert RETRIEVAL.splits(settings, Splits({}, ("train",))) == ()


def test_the_command_offers_the_scores_there_are() -> None:
    (option,) = (each for each in search.params if each.name == "score")
    assert list(option.type.choices) == ["cosine", *get_args(Score)]  # type: ignore[attr-defined]
