"""A sweep trains every combination once, and says what each scored."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import click
import pytest

from align.checkpoint import Checkpoint
from align.trainer import Training
from features.errors import ConfigError, TrainingError
from pipeline.cli.options import count_of, seeds_of, settings_of
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.config import load_config
from pipeline.study.gains import gains_of
from pipeline.study.sweep import Sweep, _label, sweep_run, sweep_table
from tests.feature_stores import make_run

ALIGN = """
batch_size = 32
steps = 6
holdout = 0.2
memory_mb = 1
head = { kind = "linear", dim = 8 }
"""
KINDS = Sweep("sweep", {"align.head.kind": ["linear", "glu"]}, [0, 1])


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(make_run(tmp_path / "run", ALIGN))


def document(sweep: Sweep, recipe: str, *overrides: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        sweep_run(sweep, load_config(recipe, overrides), StopRequest()).read_text()
    )
    return found


def test_every_combination_is_trained_with_every_seed_and_summed_up(recipe: str) -> None:
    found = document(KINDS, recipe)
    runs = {(run["settings"]["align.head.kind"], run["seed"]): run for run in found["runs"]}
    assert list(runs) == [("linear", 0), ("linear", 1), ("glu", 0), ("glu", 1)]
    for (kind, seed), run in runs.items():
        best = Checkpoint.open(Path(run["dir"]) / "align" / "best")
        assert best.head.kind == kind
        assert best.run["seed"] == seed
        assert run["scores"]["heldout/recall@10"] == best.heldout["recall@10"]
    for row in found["summary"]:
        kind = row["settings"]["align.head.kind"]
        scores = [runs[kind, seed]["scores"]["heldout/recall@10"] for seed in (0, 1)]
        expected = {"mean": statistics.mean(scores), "sd": statistics.stdev(scores), "n": 2}
        assert row["scores"]["heldout/recall@10"] == pytest.approx(expected)
    assert Path(recipe).parent.joinpath("sweep", "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert "linear" in sweep_table(found)


def test_a_sweep_that_was_stopped_goes_on_without_training_anew(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, updates, original = StopRequest(), list[int](), Training.update

    def update(training: Training, batch: Any) -> Any:
        updates.append(training.step)
        if len(updates) == 9:  # in the second of four trainings of six steps
            stop.signal_number = 15
        return original(training, batch)

    monkeypatch.setattr(Training, "update", update)
    with pytest.raises(Stopped):
        sweep_run(KINDS, load_config(recipe), stop)
    path = Path(recipe).parent / "sweep" / "sweep.json"
    assert len(json.loads(path.read_text())["runs"]) == 1
    found = document(KINDS, recipe)
    assert len(found["runs"]) == 4
    assert len(updates) == 4 * 6


def test_scaling_trains_on_nested_rows(recipe: str) -> None:
    sizes = Sweep("scaling", {"align.rows": ["40", "100"]}, [0])
    found = document(sizes, recipe)
    assert [row["settings"]["align.rows"] for row in found["summary"]] == ["40", "100"]
    assert found["summary"][0]["scores"]["heldout/recall@10"]["sd"] is None
    assert "with 100 more pairs (200 in all) heldout/recall@10 gains" in sweep_table(found)
    assert (Path(recipe).parent / "scaling" / "scaling.png").is_file()


def test_a_curve_says_what_more_pairs_give_and_which_head_is_ahead() -> None:
    def run(kind: str, rows: int, seed: int, score: float) -> dict[str, Any]:
        settings = {"align.rows": str(rows), "align.head.kind": kind}
        return {"settings": settings, "seed": seed, "scores": {"m": score}}

    # linear gains exactly 4 points (seed 0) or 6 points (seed 1) with every doubling
    runs = [
        run(kind, rows, seed, start + doubled * (0.04 + 0.02 * seed))
        for kind, start in (("glu", 0.1), ("linear", 0.3))
        for doubled, rows in enumerate((100, 200, 400, 800))
        for seed in (0, 1)
    ]
    assert gains_of(runs, "m") == [
        "kind=glu: with 800 more pairs (1,600 in all) m gains 5.0 ± 1.0 points",
        "kind=linear: with 800 more pairs (1,600 in all) m gains 5.0 ± 1.0 points",
        "kind=linear is ahead of kind=glu by 20.0 ± 0.0 points of m on average, at all sizes",
    ]
    runs[0]["scores"]["m"] = 0.9  # glu with 100 rows, seed 0
    assert gains_of(runs, "m")[-1].endswith(", but not at 100 pairs")
    for each in runs:
        del each["settings"]["align.rows"]
    assert gains_of(runs, "m") == []


def test_a_training_that_fails_is_noted_and_the_others_go_on(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Training.update

    def update(training: Training, batch: Any) -> Any:
        if training.config.head.kind == "glu":
            raise TrainingError("The loss is not finite.")
        return original(training, batch)

    monkeypatch.setattr(Training, "update", update)
    found = document(KINDS, recipe)
    assert [run["failed"] for run in found["runs"]] == [None] * 2 + ["The loss is not finite."] * 2
    assert "failed" in sweep_table(found)
    only_glu = Sweep("sweep", {"align.head.kind": ["glu"]}, [0])
    with pytest.raises(TrainingError, match="None of 1 trainings came to an end"):
        document(only_glu, recipe)


@pytest.mark.parametrize(
    ("over", "overrides", "words"),
    [
        ({"run.seed": ["1"]}, [], r"--over run.seed cannot be varied"),
        ({"align.head.kind": ["linear", "gluu"]}, [], r"align.head.kind.*got 'gluu'"),
        ({"align.head.dim": ["4"]}, ["align.holdout=0"], r"holdout = 0 leaves no rows"),
        ({"align.holdout": ["0.2", "0"]}, [], r"holdout = 0 leaves no rows"),
        ({"align.rows": ["40", "100", "40"]}, [], r"align.rows has 40 more than once"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_is_trained(
    recipe: str, over: dict[str, list[str]], overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        document(Sweep("sweep", over, [0]), recipe, *overrides)
    assert not (Path(recipe).parent / "sweep").exists()


def one_setting(text: str) -> dict[str, list[str]]:
    return settings_of([text])


def test_rows_are_read_as_counts() -> None:
    assert settings_of(["rows=300, 1k"]) == {"align.rows": ["300", "1000"]}
    with pytest.raises(click.BadParameter, match="is no number of rows"):
        settings_of(["rows=few"])


def test_values_are_read_as_they_are_written() -> None:
    assert settings_of(["align.head.kind=glu, linear"]) == {"align.head.kind": ["glu", "linear"]}
    assert seeds_of("0,1, 7") == [0, 1, 7]
    written = ("500", "10k", "1.5M", "2G", "2b")
    assert [count_of(text) for text in written] == [500, 10_000, 1_500_000, 2 * 10**9, 2 * 10**9]


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (one_setting, "align.head.kind"),
        (one_setting, "a=1,,2"),
        (seeds_of, "0,x"),
        *((count_of, text) for text in ("", "many", "M", "0", "-3", "inf", "1e400", "0.1")),
    ],
)
def test_values_that_cannot_be_read_are_refused(read: Any, text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"^{re.escape(repr(text))} "):
        read(text)


def test_a_setting_that_is_named_twice_is_refused_and_none_of_its_values_lost() -> None:
    assert settings_of(["a=1", "b=2"]) == {"a": ["1"], "b": ["2"]}
    with pytest.raises(click.BadParameter, match=r"'a' is named twice"):
        settings_of(["a=1", "a=2"])


def test_seeds_have_folders_of_their_own_however_long_the_settings_are() -> None:
    settings = {f"align.optimizer.{'x' * 30}{number}": "0.001" for number in range(4)}
    labels = [_label(settings, seed) for seed in (0, 1)]
    assert labels[0] != labels[1]
    assert max(map(len, labels)) < 128


def test_one_value_written_in_two_ways_is_drawn_in_one_place(recipe: str) -> None:
    rates = Sweep("sweep", {"align.optimizer.learning_rate": ["0.001", "1e-3"]}, [0])
    assert len(document(rates, recipe)["summary"]) == 2
