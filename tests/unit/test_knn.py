"""k-NN classification: the vote worked out by hand, and the search against its definition."""

import math

import numpy as np
import pytest

from evaluate.nearest import Neighbours, nearest_neighbours, vote


def neighbours(*cosines: float) -> Neighbours:
    return Neighbours(
        np.array([cosines], dtype=np.float32), np.arange(len(cosines), dtype=np.int64)[None]
    )


def test_votes_weigh_the_exponential_of_cosine_over_temperature() -> None:
    # exp(0.9/0.5) = 6.05 for class 1 against exp(0.6/0.5) + exp(0.5/0.5) = 6.04 for class 0.
    assert math.exp(1.8) > math.exp(1.2) + math.exp(1.0)
    found, labels = neighbours(0.9, 0.6, 0.5), np.array([1, 0, 0])
    assert vote(found, labels, k=3, temperature=0.5, num_classes=2).tolist() == [1]
    assert vote(found, labels, k=3, temperature=0.6, num_classes=2).tolist() == [0]


def test_only_the_k_nearest_vote() -> None:
    found, labels = neighbours(0.9, 0.9, 0.9), np.array([1, 0, 0])
    assert vote(found, labels, k=1, temperature=0.07, num_classes=2).tolist() == [1]
    assert vote(found, labels, k=3, temperature=0.07, num_classes=2).tolist() == [0]


def test_equal_votes_go_to_the_lower_class() -> None:
    found = neighbours(0.5, 0.5)
    assert vote(found, np.array([2, 1]), k=2, temperature=0.07, num_classes=3).tolist() == [1]


def test_a_very_low_temperature_does_not_overflow() -> None:
    found = neighbours(1.0, 0.9)
    assert vote(found, np.array([1, 0]), k=2, temperature=1e-6, num_classes=2).tolist() == [1]


@pytest.mark.parametrize("rows_at_once", [7, 1000])
@pytest.mark.parametrize("rows_per_block", [1, 7, 40, 1000])
def test_blocks_of_the_reference_give_the_neighbours_of_the_whole(
    rows_per_block: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.nearest.BLOCK_BYTES", rows_at_once * 6 * 4)
    generator = np.random.default_rng(0)
    queries = generator.standard_normal((11, 6)).astype(np.float32)
    reference = generator.standard_normal((40, 6)).astype(np.float32)
    blocks = [reference[i : i + rows_per_block] for i in range(0, 40, rows_per_block)]
    found = nearest_neighbours(queries, blocks, 9)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(reference, axis=1)
    cosine = queries @ reference.T / lengths
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :9]
    assert found.rows.tolist() == expected.tolist()
    assert found.cosines == pytest.approx(np.take_along_axis(cosine, expected, 1), abs=1e-6)


def test_fewer_rows_than_k_give_as_many_neighbours_as_there_are() -> None:
    found = nearest_neighbours(np.eye(3), [np.eye(3)[:1], np.eye(3)[1:2]], 10)
    assert found.rows.shape == (3, 2)


def test_many_classes_are_voted_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    found = Neighbours(
        np.sort(generator.random((20, 5), dtype=np.float32))[:, ::-1],
        generator.integers(0, 50, (20, 5)),
    )
    labels = generator.integers(0, 4, 50)
    whole = vote(found, labels, k=5, temperature=0.07, num_classes=4)
    monkeypatch.setattr("evaluate.nearest.VOTES_AT_ONCE", 9)
    assert vote(found, labels, k=5, temperature=0.07, num_classes=4).tolist() == whole.tolist()
