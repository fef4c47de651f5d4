"""k-NN: the neighbours of a flat FAISS index, and the votes of DINO's released `eval_knn.py`."""

import faiss
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluate.knn import nearest_neighbours, vote

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
