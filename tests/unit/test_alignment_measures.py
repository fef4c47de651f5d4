"""CKA, mutual k-NN, CKNNA and SVCCA: against their definitions on whole matrices."""

from collections.abc import Iterator

import numpy as np
import pytest

from evaluate import nearest as mutual_knn_module
from evaluate import similarity as rbf_cka_module
from evaluate.nearest import nearest_others
from evaluate.similarity import (
    Cknna,
    LinearCka,
    MutualKnn,
    PairMoments,
    RbfCka,
    Svcca,
    cka_of,
    median_distance,
    reordered,
    svcca_of,
)

Pair = tuple[np.ndarray, np.ndarray]


def related(rows: int = 90, dims: tuple[int, int] = (7, 5), seed: int = 0) -> Pair:
    """Features that share some directions, far from the origin."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((rows, 3))
    sides = [
        shared @ generator.standard_normal((3, dim)) + generator.standard_normal((rows, dim)) + 5
        for dim in dims
    ]
    return sides[0].astype(np.float32), sides[1].astype(np.float32)


def unrelated(rows: int, dim: int, seed: int = 0) -> Pair:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, dim)), generator.standard_normal((rows, dim))


def blocks(pair: Pair, rows: int) -> Iterator[Pair]:
    for start in range(0, len(pair[0]), rows):
        yield pair[0][start : start + rows], pair[1][start : start + rows]


def gram(features: np.ndarray) -> np.ndarray:
    rows = features.astype(np.float64)
    kernel: np.ndarray = rows @ rows.T
    return kernel


def rbf(features: np.ndarray, width: float) -> np.ndarray:
    rows = features.astype(np.float64)
    squares = np.square(rows[:, None] - rows[None]).sum(axis=2)
    kernel: np.ndarray = np.exp(-squares / (2 * width**2))
    return kernel


def cka_of_kernels(first: np.ndarray, second: np.ndarray, *, debiased: bool) -> float:
    """The definition, with whole matrices."""
    n = len(first)

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        if not debiased:
            centre = np.eye(n) - 1 / n
            return float(np.trace(k @ centre @ other @ centre))
        k, other, one = k - np.diag(np.diag(k)), other - np.diag(np.diag(other)), np.ones(n)
        total = np.trace(k @ other) + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
        return float((total - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3)))

    return hsic(first, second) / float(np.sqrt(hsic(first, first) * hsic(second, second)))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 90])
def test_linear_cka_in_one_pass_over_blocks_is_that_of_whole_kernels(
    rows: int, debiased: bool
) -> None:
    pair = related()
    expected = cka_of_kernels(gram(pair[0]), gram(pair[1]), debiased=debiased)
    assert cka_of(PairMoments.over(blocks(pair, rows)), debiased=debiased) == pytest.approx(
        expected, abs=1e-9
    )
    assert LinearCka(*pair, debiased=debiased)() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_linear_cka_of_wide_features_is_that_of_whole_kernels_in_any_order(debiased: bool) -> None:
    (first, second), order = unrelated(20, 50), np.random.default_rng(1).permutation(20)
    expected = cka_of_kernels(gram(first), gram(second[order]), debiased=debiased)
    assert LinearCka(first, second, debiased=debiased)(order) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("side", [13, 2048])
def test_rbf_cka_in_blocks_is_that_of_whole_kernels(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rbf_cka_module, "SIDE", side)
    pair = related()
    widths = median_distance(pair[0]), median_distance(pair[1])
    expected = cka_of_kernels(rbf(pair[0], widths[0]), rbf(pair[1], widths[1]), debiased=False)
    assert RbfCka(*pair)() == pytest.approx(expected, abs=1e-5)


def test_the_bandwidth_is_the_median_distance() -> None:
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == pytest.approx(2.0)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_change_with_rotation_scale_and_origin(debiased: bool) -> None:
    first, second = related()
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))[0]
    moved = (3 * first @ rotation - 8).astype(np.float32)
    expected = LinearCka(first, second, debiased=debiased)()
    assert LinearCka(moved, second, debiased=debiased)() == pytest.approx(expected, abs=1e-5)
    assert LinearCka(first, moved, debiased=debiased)() == pytest.approx(1, abs=1e-5)


def test_debiased_cka_of_unrelated_features_is_about_zero_where_the_biased_one_is_high() -> None:
    biased, debiased = [], []
    for seed in range(20):
        pair = unrelated(50, 200, seed)
        biased.append(LinearCka(*pair)())
        debiased.append(LinearCka(*pair, debiased=True)())
    assert np.mean(biased) > 0.7
    assert abs(np.mean(debiased)) < 0.02


def test_features_that_are_all_the_same_have_no_alignment() -> None:
    same, other = np.ones((10, 3)), np.random.default_rng(0).standard_normal((10, 3))
    assert LinearCka(same, other)() == 0
    assert Svcca(same, other)() == 0


def test_too_few_rows_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match=r"CKA of 3 rows .* At least 4"):
        cka_of(PairMoments.over([(np.zeros((3, 2)), np.zeros((3, 2)))]))
    with pytest.raises(ValueError, match="2 rows on the first side and 3 on the second"):
        PairMoments.over([(np.zeros((2, 2)), np.zeros((3, 2)))])
    with pytest.raises(ValueError, match="5 neighbours of 5 rows"):
        nearest_others(np.zeros((5, 2)), 5)


def test_mutual_knn_worked_out_by_hand() -> None:
    # On a half circle, by angle: 0–1, 1–0, 2–1, 3–2 are nearest. In the second 2 and 3 change.
    angles = np.radians([[0, 10, 25, 45], [0, 10, 45, 25]])
    first, second = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in angles)
    near = nearest_others(first, 1), nearest_others(second, 1)
    assert near[0].rows.ravel().tolist() == [1, 0, 1, 2]
    assert near[1].rows.ravel().tolist() == [1, 0, 3, 1]
    assert MutualKnn(*near).of_rows().tolist() == [1, 1, 0, 0]
    assert MutualKnn(*near)() == 0.5


@pytest.mark.parametrize(("queries", "rows"), [(7, 11), (4096, 65_536)])
def test_blocks_of_rows_find_the_nearest_others_of_the_whole(
    queries: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutual_knn_module, "QUERIES_AT_ONCE", queries)
    monkeypatch.setattr(mutual_knn_module, "ROWS_AT_ONCE", rows)
    features = related()[0]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T - 3 * np.eye(len(unit))
    expected = np.argsort(-cosine, axis=1)[:, :9]
    assert nearest_others(features, 9).rows.tolist() == expected.tolist()


def test_a_row_is_never_its_own_neighbour_even_among_copies_of_it() -> None:
    found = nearest_others(np.ones((6, 2)), 2).rows
    assert not (found == np.arange(6)[:, None]).any()


def test_an_order_of_the_rows_gives_the_neighbours_of_the_rows_in_that_order() -> None:
    features, order = related()[0], np.random.default_rng(0).permutation(90)
    expected = nearest_others(features[order], 4).rows
    assert reordered(nearest_others(features, 4).rows, order).tolist() == expected.tolist()


def test_every_measure_in_an_order_is_the_measure_of_the_rows_in_that_order() -> None:
    first, second = related()
    order = np.random.default_rng(0).permutation(90)
    near = nearest_others(first, 5), nearest_others(second, 5), nearest_others(second[order], 5)
    for ready, shuffled in (
        (LinearCka(first, second, debiased=True), LinearCka(first, second[order], debiased=True)),
        (RbfCka(first, second), RbfCka(first, second[order])),
        (Svcca(first, second, dims=3), Svcca(first, second[order], dims=3)),
        (MutualKnn(near[0], near[1]), MutualKnn(near[0], near[2])),
        (Cknna(near[0], near[1]), Cknna(near[0], near[2])),
    ):
        assert ready(order) == pytest.approx(shuffled(), abs=1e-5)
        assert ready(order) != pytest.approx(ready(), abs=1e-4)


def test_the_same_features_are_wholly_aligned() -> None:
    first, _ = related()
    near = nearest_others(first, 5)
    assert MutualKnn(near, near)() == 1
    assert Cknna(near, near)() == pytest.approx(1)
    assert Svcca(first, first, dims=3)() == pytest.approx(1)


def test_svcca_over_blocks_is_that_of_the_whole_and_that_of_a_singular_value_decomposition() -> (
    None
):
    pair = related()
    sides = []
    for features in pair:
        rows = features.astype(np.float64)
        rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
        sides.append(np.linalg.svd(rows, full_matrices=False)[0][:, :3])
    expected = np.linalg.svd(sides[0].T @ sides[1], compute_uv=False).mean()
    assert svcca_of(PairMoments.over(blocks(pair, 20)), dims=3) == pytest.approx(expected, abs=1e-9)
    assert Svcca(*pair, dims=3)() == pytest.approx(expected, abs=1e-9)


def test_svcca_of_wide_features_is_the_same_from_products_of_rows() -> None:
    pair = unrelated(20, 50)
    constant = np.full((20, 1), 0.1)
    wide = np.hstack([pair[0], constant]), np.hstack([constant, pair[1]])
    assert Svcca(*wide, dims=3)() == pytest.approx(
        svcca_of(PairMoments.over([pair]), dims=3), abs=1e-9
    )
