"""Approximate k-NN: its neighbours against the exact ones, and its word about itself."""

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from evaluate import nearest as ivf_pq
from evaluate.measures.knn import KnnSettings, find_neighbours
from evaluate.nearest import approximate_neighbours, nearest_neighbours, unit_rows, vote
from features.errors import EvaluationError

ROWS, DIM, K = 10_000, 16, 10


@pytest.fixture(autouse=True)
def fewer_rows_to_learn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf_pq, "TRAINED_ON", 20)
    monkeypatch.setattr(ivf_pq, "LEAST_ROWS", 2000)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """Queries, and a reference of a hundred clusters."""
    generator = np.random.default_rng(0)
    centres = 2 * generator.standard_normal((100, DIM), dtype=np.float32)
    drawn = centres[generator.integers(0, 100, ROWS + 300)]
    drawn += generator.standard_normal(drawn.shape, dtype=np.float32)
    return drawn[:300], drawn[300:]


def blocks(reference: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(reference), 1111):
        yield reference[start : start + 1111]


@pytest.mark.slow
def test_most_neighbours_are_found_with_exact_cosines_and_the_recall_says_how_many(
    data: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ivf_pq, "COMPARED_BYTES", 4 * DIM * 50)  # compared in many parts
    monkeypatch.setattr("evaluate.nearest.BLOCK_BYTES", 4 * DIM * 3000)
    queries, reference = data
    found = approximate_neighbours(queries, partial(blocks, reference), ROWS, K, seed=0)
    exact = nearest_neighbours(queries, [reference], K)
    assert found.about.startswith("IVF100,PQ4, 6 lists, 40 candidates")
    cosines = np.einsum(
        "qd,qkd->qk", unit_rows(queries), unit_rows(reference)[found.neighbours.rows]
    )
    np.testing.assert_allclose(found.neighbours.cosines, cosines, atol=1e-5)
    assert (np.diff(found.neighbours.cosines, axis=1) <= 0).all()
    shared = np.mean(
        [np.isin(*each).mean() for each in zip(exact.rows, found.neighbours.rows, strict=True)]
    )
    assert 0.8 < shared < 1
    assert found.recall == pytest.approx(shared, abs=0.02)  # of 256 of the 300 queries
    assert found.recall_queries == 256


def test_neighbours_that_were_not_found_do_not_vote() -> None:
    reference = np.eye(4, dtype=np.float32)
    found = np.array([[2, -1, 0]])
    nearest = ivf_pq._compared(reference[2:3], found, lambda: iter([reference]), 3)
    assert nearest.rows.tolist() == [[2, 0, -1]]
    assert nearest.cosines.tolist() == [[1, 0, -np.inf]]
    labels = np.array([1, 0, 1, 0])  # the last of which row −1 would be
    for k in (2, 3):
        assert vote(nearest, labels, k=k, temperature=0.07, num_classes=2).tolist() == [1]
    alone = ivf_pq._compared(reference[2:3], found[:, :2], lambda: iter([reference]), 2)
    assert vote(alone, labels, k=2, temperature=1e9, num_classes=2).tolist() == [1]


def test_the_setting_decides_the_search_and_the_protocol_tells_it(
    data: tuple[np.ndarray, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    queries, reference = data
    settings = KnnSettings(knn_search="ivf-pq")
    with caplog.at_level("INFO"):
        found, about = find_neighbours(settings, queries, partial(blocks, reference), ROWS, K)
        few, exact = find_neighbours(settings, queries, partial(blocks, reference[:500]), 500, K)
    assert found.rows.shape == few.rows.shape == (300, K)
    assert about["recall_of"] == "the exact 10 nearest of 256 queries"
    assert 0.8 < float(str(about["recall"])) < 1
    assert (exact["search"], "recall" in exact) == ("exact", False)
    assert "500 rows are searched exactly: IVF-PQ takes 10000" in caplog.text
    assert f"{exact['searched_with']}" in caplog.text


def test_without_faiss_the_setting_is_refused_with_what_to_do(
    data: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, reference = data
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(EvaluationError, match=r"cannot be imported.*Install faiss-cpu"):
        approximate_neighbours(queries, partial(blocks, reference), ROWS, K, seed=0)
