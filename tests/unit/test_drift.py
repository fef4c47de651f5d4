"""How far two sets of embeddings are apart, by hand."""

import numpy as np
import pytest

from features.errors import EvaluationError
from pipeline.run.check import compare_embeddings, refuse_drift

ANGLE = 0.2
EAST, NORTH = [1.0, 0.0], [0.0, 1.0]


def vectors(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def at(angle: float) -> list[float]:
    return [float(np.cos(angle)), float(np.sin(angle))]


def test_equal_embeddings_have_no_drift_at_all() -> None:
    random = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    found = compare_embeddings(random, random.copy(), random)
    assert found == {"max_abs_difference": 0, "min_cosine": 1, "changed_neighbours": 0}


def test_the_row_that_is_turned_farthest_counts() -> None:
    found = compare_embeddings(
        vectors(EAST, EAST), vectors(at(ANGLE / 2), at(ANGLE)), vectors(EAST)
    )
    assert found["min_cosine"] == pytest.approx(np.cos(ANGLE), abs=1e-6)
    assert found["max_abs_difference"] == pytest.approx(np.sin(ANGLE), abs=1e-6)


def test_a_neighbour_has_changed_where_another_is_clearly_nearer() -> None:
    candidates = vectors(EAST, NORTH)
    found = compare_embeddings(vectors(at(0.7), EAST), vectors(at(0.9), EAST), candidates)
    assert found["changed_neighbours"] == 1  # π/4, where both are as near, is between 0.7 and 0.9


@pytest.mark.parametrize("turned", [(np.pi / 4, 1.5), (0.1, np.pi / 4)])
def test_a_neighbour_that_is_as_near_in_either_way_has_not_changed(
    turned: tuple[float, float],
) -> None:
    usual, other = vectors(at(turned[0])), vectors(at(turned[1]))
    usual, other = usual - vectors([2e-7, 0]), other + vectors([0, 2e-7])  # so that argmax differs
    found = compare_embeddings(usual, other, vectors(EAST, NORTH))
    assert found["changed_neighbours"] == 0


def test_an_embedding_that_is_not_finite_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"is not finite.*float32"):
        compare_embeddings(vectors(EAST), vectors([np.nan, 0.0]), vectors(EAST))


def test_only_what_exceeds_the_tolerance_is_named() -> None:
    def drift(over: str, min_cosine: float | None) -> dict[str, object]:
        return {"modality": "image", "over": over, "usual": "a", "other": "b"} | {
            "min_cosine": min_cosine
        }

    drifts = [drift("padding", 0.999), drift("device", None), drift("batch size", 0.95)]
    document = {"protocol": {"tolerance": 0.01}, "drifts": drifts}
    with pytest.raises(
        EvaluationError,
        match=r"tolerance: image embeddings over batch size \(a against b\) by 0.05",
    ) as caught:
        refuse_drift(document)
    assert "padding" not in str(caught.value)
    refuse_drift({"protocol": {"tolerance": 0.06}, "drifts": drifts})
