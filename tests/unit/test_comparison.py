"""Two evaluated runs are compared item by item, and refused where they are not comparable."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluate.results import Items, Result, read_items, write_items, write_results, write_stamp
from evaluate.statistics import interval_of, paired_interval
from features.errors import EvaluationError
from pipeline.study.comparison import compare_runs, comparison_plot, comparison_table


def evaluated(run: Path, hits: list[int], *, items: bool = True, **protocol: Any) -> Path:
    """The folder of a run with one number."""
    result = Result(
        task="zero_shot",
        dataset="test",
        metric="top1",
        value=float(np.mean(hits)),
        n=len(hits),
        ci95=None,
        encoders={"image": "a", "text": "b"},
        protocol={"rows_sha256": "1", "templates": ["{}"]} | protocol,
    )
    write_results(run / "eval" / "results.json", run="r", checkpoint_sha256="0", results=[result])
    if items:
        write_items(run / "eval" / "items.npz", {result.name: Items(np.array(hits))})
    return run


def test_items_that_both_runs_get_alike_leave_no_difference_in_any_resample() -> None:
    hits = np.array([0, 1] * 50)
    assert paired_interval(Items(hits), Items(hits), resamples=100, seed=0) == (0.0, 0.0)


def test_a_paired_interval_is_that_of_the_differences_of_the_items() -> None:
    random = np.random.default_rng(0)
    first = random.integers(0, 2, 400)
    second = np.where(random.random(400) < 0.1, 1, first)
    found = paired_interval(Items(first), Items(second), resamples=4000, seed=0)
    assert found is not None
    drawn = random.integers(0, 400, (4000, 400))
    expected = np.quantile((second - first)[drawn].mean(axis=1), [0.025, 0.975])
    assert found == pytest.approx(tuple(expected), abs=0.004)
    alone = interval_of(Items(first), resamples=4000, seed=0)
    assert alone is not None
    assert found[1] - found[0] < 0.5 * (alone[1] - alone[0])


def test_a_mean_over_classes_is_drawn_as_such() -> None:
    classes = np.array([0] * 90 + [1] * 10)
    first, second = np.zeros(100, dtype=int), (classes == 1).astype(int)
    found = paired_interval(
        Items(first, classes=classes), Items(second, classes=classes), resamples=500, seed=0
    )
    assert found == (0.5, 0.5)  # one class of two, whatever its size


def test_items_come_back_as_they_were_written(tmp_path: Path) -> None:
    items = {
        "retrieval/text_to_image test recall@1": Items(np.array([2, 0]), np.array([5, 5])),
        "zero_shot test mean_per_class": Items(np.array([1]), classes=np.array([3])),
    }
    write_items(tmp_path / "items.npz", items)
    found = read_items(tmp_path / "items.npz")
    assert list(found) == list(items)
    assert found["zero_shot test mean_per_class"].counts is None
    assert found["zero_shot test mean_per_class"].classes == pytest.approx([3])
    assert found["retrieval/text_to_image test recall@1"].counts == pytest.approx([5, 5])


def test_items_that_an_evaluation_wrote_must_be_there(tmp_path: Path) -> None:
    one, two = (evaluated(tmp_path / name, [0, 1] * 20) for name in "ab")
    write_stamp(two / "eval", "inputs", ["items.npz"])
    (two / "eval" / "items.npz").unlink()
    with pytest.raises(EvaluationError, match=r"b/eval/items\.npz .*it is missing, and the eval"):
        compare_runs(one, two)


def test_the_table_and_the_plot_show_a_difference_that_is_certain(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [0] * 60 + [1] * 40)
    second = evaluated(tmp_path / "b", [0] * 40 + [1] * 60)
    document = compare_runs(first, second)
    row = document["measures"][0]
    assert row["difference"] == pytest.approx(0.2)
    assert row["paired"]
    assert row["ci95"][0] > 0
    assert "+20.0" in comparison_table(document)
    assert " *" in comparison_table(document)
    comparison_plot(document, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_without_items_the_difference_says_that_it_has_no_paired_interval(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [0, 1], items=False)
    document = compare_runs(first, evaluated(tmp_path / "b", [1, 1]))
    assert document["measures"][0]["ci95"] is None
    assert "not paired" in comparison_table(document)


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ({"rows_sha256": "2"}, 'rows_sha256 = "1" and "2"'),
        ({"templates": ["a {}"]}, r'templates = \["\{\}"\] and \["a \{\}"\]'),
    ],
)
def test_other_rows_or_another_protocol_are_refused(
    tmp_path: Path, protocol: dict[str, Any], words: str
) -> None:
    first = evaluated(tmp_path / "a", [0, 1])
    second = evaluated(tmp_path / "b", [0, 1], **protocol)
    with pytest.raises(EvaluationError, match=words):
        compare_runs(first, second)


def test_what_follows_from_the_encoder_is_no_other_protocol(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [0, 1], patch=14, mean=[0.5], patch_feature="patch token")
    second = evaluated(tmp_path / "b", [1, 1], patch=16, mean=[0.4], patch_feature="two tokens")
    assert compare_runs(first, second)["measures"][0]["difference"] == 0.5


def test_a_run_that_is_not_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no eval/results\.json.*sail eval"):
        compare_runs(tmp_path, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"results": [{"task": "zero_shot"}]}'])
def test_results_that_are_damaged_are_told_in_words(content: str, tmp_path: Path) -> None:
    run = evaluated(tmp_path, [1, 0])
    (run / "eval" / "results.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"results\.json cannot be read.* `sail eval` again"):
        compare_runs(run, run)
