"""Retrieval: ranks worked out by hand, several captions per image, ties, and the chance of it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from align.checkpoint import load_head
from align.heads import LinearHead
from align.heldout import Relevance, retrieval_ranks
from evaluate.embedder import Embedder
from evaluate.measures.retrieval import (
    chance_recall,
    hits_per_image,
    median_rank,
    recall,
    same_words,
)
from evaluate.results import read_results
from features.errors import EvaluationError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.evaluate import evaluate_run
from tests.trained import trained


def angles(*degrees: float) -> torch.Tensor:
    """Unit vectors of the plane: the nearer the angle, the higher the cosine."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def own(*owner: int) -> Relevance:
    return Relevance(max(owner) + 1, torch.tensor(owner))


def test_an_image_is_ranked_by_the_nearest_of_its_captions() -> None:
    # Image 0 (0°) has captions at 50° and 10°; image 1 (90°) has the one at 20°.
    ranks = retrieval_ranks(angles(0, 90), angles(50, 10, 20), own(0, 0, 1))
    assert ranks.by_image.tolist() == [0, 1]  # before 20° only 50° is nearer to 90°
    assert ranks.right_texts.tolist() == [2, 1]


def test_each_caption_is_a_query_of_its_own() -> None:
    ranks = retrieval_ranks(angles(0, 90), angles(50, 10, 20), own(0, 0, 1))
    assert ranks.by_text.tolist() == [1, 0, 1]  # 50° is nearer to 90°, 20° nearer to 0°
    assert recall(ranks.by_text.numpy(), 1) == pytest.approx(1 / 3)
    assert recall(ranks.by_text.numpy(), 5) == 1


def test_words_that_never_repeat_rank_as_own_captions_do_also_where_some_are_no_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(20, 6, generator=generator)
    owner = torch.arange(20).repeat_interleave(3)
    text = image[owner] + torch.randn(60, 6, generator=generator)
    text[7] = image[4] = torch.nan
    by_owner = retrieval_ranks(image, text, Relevance(20, owner))
    by_words = retrieval_ranks(image, text, Relevance(20, owner, torch.arange(60)))
    for name, found in vars(by_owner).items():
        assert found.tolist() == getattr(by_words, name).tolist()


def test_the_median_rank_counts_from_one() -> None:
    assert median_rank(np.array([0, 0, 4])) == 1
    assert median_rank(np.array([0, 3, 4, 9])) == 4.5


def test_perfect_embeddings_have_recall_one_both_ways() -> None:
    points = angles(*range(0, 360, 10))
    ranks = retrieval_ranks(points, 3 * points, own(*range(36)))
    assert recall(ranks.by_image.numpy(), 1) == recall(ranks.by_text.numpy(), 1) == 1


def test_embeddings_that_are_all_the_same_find_nothing() -> None:
    same = torch.ones(4, 3)
    ranks = retrieval_ranks(same, same, own(0, 1, 2, 3))
    assert ranks.by_image.tolist() == ranks.by_text.tolist() == [3, 3, 3, 3]


def test_a_wrong_caption_as_near_as_the_right_one_counts_as_nearer() -> None:
    ranks = retrieval_ranks(angles(0, 90), angles(30, 30, 90), own(0, 1, 1))
    assert ranks.by_image.tolist() == [1, 0]


def test_equal_captions_tie_however_their_products_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    image, caption = torch.randn(7, 5, generator=generator), torch.randn(1, 5, generator=generator)
    ranks = retrieval_ranks(image, caption.expand(7, 5), own(*range(7)))
    assert ranks.by_image.tolist() == [6] * 7
    ranks = retrieval_ranks(caption.expand(7, 5), image, own(*range(7)))
    assert ranks.by_text.tolist() == [6] * 7


def test_a_cosine_that_is_not_a_number_never_scores() -> None:
    image = angles(0, 90)
    image[0] = torch.nan
    ranks = retrieval_ranks(image, angles(0, 90), own(0, 1))
    assert ranks.by_image.tolist() == [1, 0]
    assert ranks.by_text.tolist() == [1, 1]


def test_a_caption_with_the_same_words_is_as_right_as_the_own_one_when_asked() -> None:
    words = torch.from_numpy(same_words(["a dog", "a cat", "a dog"]))
    image, text = angles(0, 90, 12), angles(10, 90, 10)
    strict = retrieval_ranks(image, text, own(0, 1, 2))
    lenient = retrieval_ranks(image, text, Relevance(3, torch.tensor([0, 1, 2]), words))
    assert strict.by_image.tolist() == [1, 0, 1]
    assert strict.by_text.tolist() == [1, 0, 0]
    assert lenient.by_image.tolist() == lenient.by_text.tolist() == [0, 0, 0]
    assert lenient.right_texts.tolist() == lenient.right_images.tolist() == [2, 1, 2]


def test_blocks_of_any_size_give_the_ranks_of_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(23, 5, generator=generator)
    text = torch.randn(61, 5, generator=generator)
    owner = torch.cat([torch.arange(23), torch.randint(23, (38,), generator=generator)])
    words = torch.randint(30, (61,), generator=generator)
    for relevance in (Relevance(23, owner), Relevance(23, owner, words)):
        whole = dense_ranks(image, text, relevance)
        for cosines in (1, 50, 300, 10_000):
            monkeypatch.setattr("align.heldout.COSINES_AT_ONCE", cosines)
            ranks = retrieval_ranks(image, text, relevance)
            assert (ranks.by_image.tolist(), ranks.by_text.tolist()) == whole


def dense_ranks(
    image: torch.Tensor, text: torch.Tensor, relevance: Relevance
) -> tuple[list[int], list[int]]:
    """The definition, pair by pair, with sets."""
    cosine = torch.nn.functional.cosine_similarity(image[:, None].double(), text[None].double(), -1)
    words = relevance.words if relevance.words is not None else torch.arange(len(text))
    said = [set(words[relevance.owner == i].tolist()) for i in range(len(image))]
    right = torch.tensor([[int(w) in s for w in words] for s in said])

    def rank(scores: torch.Tensor, right: torch.Tensor) -> int:
        return int((scores[~right] >= scores[right].max() - 1e-6).sum())

    by_image = [rank(cosine[i], right[i]) for i in range(len(image))]
    by_text = [rank(cosine[:, j], right[:, j]) for j in range(len(text))]
    return by_image, by_text


def test_chance_is_that_of_drawing_without_replacement() -> None:
    assert chance_recall(np.array([1]), 10, 5) == pytest.approx(0.5)
    # Two right ones of four, two drawn: 1 - (2/4)(1/3).
    assert chance_recall(np.array([2]), 4, 2) == pytest.approx(1 - 1 / 6)
    assert chance_recall(np.array([1, 2]), 2, 5) == 1


def test_captions_are_counted_with_their_image() -> None:
    hits, counts = hits_per_image(np.array([0, 3, 0]), np.array([1, 0, 1]), images=3, k=1)
    assert hits.tolist() == [0, 2, 0]
    assert counts.tolist() == [1, 2, 0]


def test_the_first_numbers_of_a_head_rank_as_one_without_the_others(tmp_path: Path) -> None:
    closed = ("align.start='cca'", "align.steps=0", "align.head={kind='linear', dim=8}")
    run = trained(tmp_path, *closed)

    def recalls(run: Path, *overrides: str) -> dict[tuple[int | None, str, str], float]:
        path = evaluate_run(load_config(str(run), overrides), StopRequest())
        found = [each for each in read_results(path) if each.task.startswith("retrieval")]
        return {
            (each.protocol.get("dim"), each.dataset + each.task, each.metric): each.value
            for each in found
        }

    found = recalls(run, "eval.retrieval_dims=[3, 8]")
    names = [(task, metric) for dim, task, metric in found if dim is None]
    assert len(names) == 18
    assert all(found[8, task, metric] == found[None, task, metric] for task, metric in names)
    model, checkpoint = load_head(run / "align" / "best")
    for head in (model.image_head, model.text_head):
        assert isinstance(head, LinearHead)
        head.linear.weight[3:] = head.linear.bias[3:] = 0
    embedder = Embedder(model, checkpoint, torch.device("cpu"))
    store = FeatureStore.open(run / "features" / "test.zarr")
    image, text = embedder.images(store).vectors, embedder.captions(store, "long").vectors
    ranks = retrieval_ranks(image, text, own(*range(store.rows)))
    for task, by_query in (("image_to_text", ranks.by_image), ("text_to_image", ranks.by_text)):
        value = found[3, f"test/longretrieval/{task}", "recall@5"]
        assert value == pytest.approx(recall(by_query.numpy(), 5))
    with pytest.raises(EvaluationError, match="retrieval_dims has 9, and the head is a linear one"):
        recalls(run, "eval.retrieval_dims=[9]")
