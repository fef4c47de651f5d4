"""The nearest rows: the same whichever way they are searched, or nearly, and within the memory."""

from pathlib import Path

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from evaluate import nearest
from evaluate.nearest import open_search

ROWS, DIM = 6000, 16


@pytest.fixture
def few_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of the same form for thousands of rows instead of millions."""
    monkeypatch.setattr(nearest, "LISTS", 32)
    monkeypatch.setattr(nearest, "LEARNED_FROM", 2048)
    monkeypatch.setattr(nearest, "PROBES", 8)
    monkeypatch.setattr(nearest, "EXACT_BYTES", 1 << 10)
    monkeypatch.setattr(nearest, "ROWS_AT_ONCE", 1000)


@pytest.fixture
def embeddings(tmp_path: Path) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM))
    written = open_memmap(tmp_path / "rows.npy", "w+", dtype="<f2", shape=(ROWS, DIM))
    written[:] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return written


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((40, DIM)).astype(np.float32)


def test_in_memory_and_from_disk_the_nearest_are_those_of_all_cosines(
    embeddings: np.ndarray, queries: np.ndarray
) -> None:
    cosines = queries @ embeddings.astype(np.float32).T
    cosines /= np.linalg.norm(queries, axis=1)[:, None]
    cosines /= np.linalg.norm(embeddings.astype(np.float32), axis=1)
    for memory in (1 << 40, 0):
        search = open_search(embeddings, Path("unused.faiss"), memory)
        for query, row in zip(queries, cosines, strict=True):
            found = search(query, 10)
            assert found.rows[0].tolist() == np.argsort(-row)[:10].tolist()
            np.testing.assert_allclose(found.cosines[0], np.sort(row)[::-1][:10], atol=1e-6)


@pytest.mark.usefixtures("few_lists")
def test_the_approximate_search_gives_true_cosines_of_nearly_all_the_nearest(
    embeddings: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    exact = open_search(embeddings, tmp_path / "rows.faiss", 0)
    approximate = open_search(embeddings, tmp_path / "rows.faiss", 1 << 40)
    hits = 0
    for query in queries:
        expected, found = exact(query, 10), approximate(query, 10)
        hits += len(np.intersect1d(expected.rows, found.rows))
        assert np.all(np.diff(found.cosines[0]) <= 0)
        unit = query / np.linalg.norm(query)
        cosines = embeddings[found.rows[0]].astype(np.float32) @ unit
        np.testing.assert_allclose(found.cosines[0], cosines, atol=1e-6)
    assert hits >= 0.85 * 10 * len(queries)


@pytest.mark.usefixtures("few_lists")
def test_an_index_is_built_once(
    embeddings: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "rows.faiss"
    first = open_search(embeddings, path, 1 << 40)(queries[0], 10)
    assert not list(tmp_path.glob(".*"))
    written = path.stat().st_mtime_ns
    again = open_search(embeddings, path, 1 << 40)(queries[0], 10)
    assert path.stat().st_mtime_ns == written
    np.testing.assert_array_equal(first.rows, again.rows)


@pytest.mark.usefixtures("few_lists")
def test_the_memory_that_is_allowed_decides_how_rows_are_searched(
    embeddings: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "rows.faiss"
    chosen = {
        memory: open_search(embeddings, path, memory).name
        for memory in (0, ROWS * (DIM + 8) - 1, ROWS * (DIM + 8), 1 << 40)
    }
    assert list(chosen.values()) == [
        "exact, from disk",
        "exact, from disk",
        "approximate",
        "approximate",
    ]
    assert path.stat().st_size < 1.1 * ROWS * (DIM + 8)
    assert open_search(embeddings[:10], path, 1 << 40).name == "exact"
    nothing = open_search(embeddings[:0], path, 0)
    assert nothing(np.ones(DIM, dtype=np.float32), 5).rows.size == 0
