"""k-NN: the neighbours of a flat FAISS index, and the votes of DINO's released `eval_knn.py`."""

import sys

import faiss
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluate import nearest as flat_search_module
from evaluate.nearest import flat_search, nearest_neighbours, vote

ROWS, QUERIES, DIM, CLASSES = 3000, 400, 32, 7


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference rows around the mean of their class, their labels, and queries."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, CLASSES, ROWS)
    means = generator.standard_normal((CLASSES, DIM))
    reference = means[labels] + 2 * generator.standard_normal((ROWS, DIM))
    queries = means[generator.integers(0, CLASSES, QUERIES)]
    queries = queries + 2 * generator.standard_normal((QUERIES, DIM))
    return reference.astype(np.float32), labels, queries.astype(np.float32)


@pytest.mark.parametrize("rows_per_block", [257, ROWS])
def test_the_neighbours_are_those_of_a_flat_index(
    data: tuple[np.ndarray, np.ndarray, np.ndarray], rows_per_block: int
) -> None:
    reference, _, queries = data
    blocks = (reference[i : i + rows_per_block] for i in range(0, ROWS, rows_per_block))
    found = nearest_neighbours(queries, blocks, 20)
    whole, wanted = reference.copy(), queries.copy()
    faiss.normalize_L2(whole)
    faiss.normalize_L2(wanted)
    index = faiss.IndexFlatIP(DIM)
    index.add(whole)
    cosines, rows = index.search(wanted, 20)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)


def test_without_faiss_torch_finds_the_same_neighbours(
    data: tuple[np.ndarray, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _, queries = data
    expected = nearest_neighbours(queries, [reference], 20)
    monkeypatch.setitem(sys.modules, "faiss", None)  # an import of it fails
    monkeypatch.setattr(flat_search_module, "COSINES_AT_ONCE", 7 * ROWS)
    without = flat_search()
    monkeypatch.setattr("evaluate.nearest.flat_search", lambda: without)
    found = nearest_neighbours(queries, [reference], 20)
    assert "no FAISS" in without.name
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.cosines, expected.cosines, atol=1e-6)


@pytest.mark.gpu
def test_faiss_on_a_gpu_finds_the_same_neighbours(
    data: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    if not flat_search().name.endswith("on the GPU"):
        pytest.skip(f"needs faiss-gpu and a GPU, but there is {flat_search().name}")
    reference, _, queries = data
    found = nearest_neighbours(queries, [reference], 20)
    cosines = F.normalize(torch.from_numpy(queries)) @ F.normalize(torch.from_numpy(reference)).T
    expected = cosines.topk(20)
    assert (found.rows == expected.indices.numpy()).mean() > 0.999  # near ties may change places
    np.testing.assert_allclose(found.cosines, expected.values.numpy(), atol=1e-3)


@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_the_votes_are_those_of_dino(
    data: tuple[np.ndarray, np.ndarray, np.ndarray], k: int
) -> None:
    reference, labels, queries = data
    found = nearest_neighbours(queries, [reference], 200)
    ours = vote(found, labels, k=k, temperature=0.07, num_classes=CLASSES)
    # The method of `knn_classifier`: one-hot votes of the k nearest, weighed by exp(cosine / T).
    similarity = (
        F.normalize(torch.from_numpy(queries), dim=1)
        @ F.normalize(torch.from_numpy(reference), dim=1).T
    )
    cosines, nearest = similarity.topk(k, largest=True, sorted=True)
    one_hot = F.one_hot(torch.from_numpy(labels)[nearest], CLASSES)
    votes = (one_hot * cosines.div(0.07).exp()[:, :, None]).sum(dim=1)
    np.testing.assert_array_equal(ours, votes.argmax(dim=1).numpy())
