"""`sail study` and `sail pick` over several real encoders, from a store to the table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.trainer import Training
from evaluate.results import Items
from features.errors import ConfigError
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.study import pick_run, study_run
from pipeline.study.outcome import correlations, ranking, study_table
from pipeline.study.probes import Probe
from tests import tiny
from tests.commands import sail
from tests.feature_stores import StopAfter

CANDIDATES = """
knn = ["test"]
[encoders.image.vit.also.vit-mean]
pooling = "mean"
[encoders.image.vit.also.vit-input]
pooling = "mean"
layer = 0
[encoders.image.vit.also.vit-both]
pooling = "cls+mean"
"""
IMAGES = ("vit", "vit-mean", "vit-input", "vit-both")
STEPS = "align.steps=4"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe of four image columns and a text encoder, extracted."""
    run_file = tiny.world(tmp_path_factory.mktemp("world"), rows=120, extra=[CANDIDATES])
    extract(load_config(str(run_file)), StopRequest())
    return str(run_file)


@pytest.mark.slow
def test_a_study_measures_every_pair_and_a_second_one_computes_nothing(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.csv"
    scores.write_text("encoder,parameters\n" + "".join(f"{n},{i}\n" for i, n in enumerate(IMAGES)))
    path = study_run(load_config(recipe, [STEPS]), StopRequest(), scores=scores)
    document: dict[str, Any] = json.loads(path.read_text())
    assert {pair["image"] for pair in document["pairs"]} == set(IMAGES)
    for pair in document["pairs"]:
        assert set(pair["measures"]) == {"cka", "mutual_knn", "cknna", "svcca"}
        assert all(found["seconds"] >= 0 for found in pair["measures"].values())
        for found in pair["measures"].values():
            assert found["ci95"][0] < found["value"] < found["ci95"][1]
        assert pair["seconds"] > 0
    assert set(document["encoders"]) == set(IMAGES)
    for measured in document["encoders"].values():
        for found in measured.values():
            assert found["ci95"][0] <= found["value"] <= found["ci95"][1]
        assert measured["knn_top1"]["search"] == "exact"
    over = {row["measure"]: (row["over"], row["n"]) for row in document["correlations"]}
    assert over["cka"] == ("pairs", 4)
    assert over["parameters"] == ("image encoders", 4)
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "vit-input" in path.with_suffix(".md").read_text()

    monkeypatch.setattr(Training, "update", None)  # a training would fail
    again: dict[str, Any] = json.loads(
        study_run(load_config(recipe, [STEPS]), StopRequest(), scores=scores).read_text()
    )
    assert again == document
    other = json.loads(
        study_run(load_config(recipe, [STEPS, "eval.knn_k=[1]"]), StopRequest()).read_text()
    )
    assert {each["knn_top1"]["k"] for each in document["encoders"].values()} == {3}
    assert {each["knn_top1"]["k"] for each in other["encoders"].values()} == {1}
    assert "parameters" in study_table(document)
    assert "there are 4 pairs" in study_table(document | {"correlations": []})
    assert "Best: " in sail("pick", recipe, "--set", STEPS).stdout


@pytest.mark.slow
def test_a_pick_that_was_stopped_goes_on(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [STEPS, f"run.dir='{tmp_path}'", f"run.features='{Path(recipe).parent / 'run'}'"]
    config = load_config(recipe, settings)
    updates, update = list[int](), Training.update

    def counted(training: Training, batch: Any) -> Any:
        updates.append(training.step)
        return update(training, batch)

    monkeypatch.setattr(Training, "update", counted)
    with pytest.raises(Stopped):
        pick_run(config, "test", StopAfter(8))
    assert 0 < len(updates) < 4 * len(IMAGES)
    document = json.loads(pick_run(config, "test", StopRequest()).read_text())
    assert {pair["image"] for pair in document["pairs"]} == set(IMAGES)
    assert len(updates) == 4 * len(IMAGES)  # no step was made twice


def test_a_split_that_is_trained_on_is_none_to_score_on(recipe: str) -> None:
    with pytest.raises(ConfigError, match="--on train is no split to score on"):
        pick_run(load_config(recipe, [STEPS]), "train", StopRequest())


def test_scores_of_an_encoder_that_the_recipe_has_not_are_refused(
    recipe: str, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.csv"
    scores.write_text("encoder,mteb\nother,61.4\n")
    with pytest.raises(ConfigError, match="line 2, has encoder = 'other'"):
        study_run(load_config(recipe, [STEPS]), StopRequest(), scores=scores)


def test_a_measure_of_too_few_encoders_is_said_not_to_be_correlated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = [
        {"image": name, "text": "t", "recall@10": number / 10, "measures": {}}
        for number, name in enumerate("abc")
    ]
    images = {name: {"knn_top1": {"value": number}} for number, name in enumerate("abc")}
    assert correlations(pairs, images, {}) == []
    assert "knn_top1 is not correlated: it has 3 image encoders, and 4 that" in caplog.text


def test_the_probability_of_being_best_is_that_of_winning_a_draw_of_the_images() -> None:
    def probe(name: str, right: float) -> Probe:
        hits = (np.random.default_rng(0).random(200) < right).astype(np.int64)
        return Probe(name, "t", 1.0, {w: Items(hits) for w in ("image_to_text", "text_to_image")})

    rows = ranking([probe("worse", 0.2), probe("good", 0.7), probe("as good", 0.7)])
    assert [row["image"] for row in rows][2] == "worse"
    assert [row["probability_best"] for row in rows] == [0.5, 0.5, 0.0]
    assert rows[0]["ci95"][0] < rows[0]["recall@10"] < rows[0]["ci95"][1]
