"""The third stage on small real stores: every measure, from the features to results.json."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from align.checkpoint import load_head
from evaluate.measures import MEASURES
from evaluate.results import read_items, read_results
from evaluate.similarity import LinearCka, RbfCka
from features.encoders import load_text_encoder
from features.errors import EvaluationError
from features.store import FeatureStore
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import RunConfig, load_config
from pipeline.run.evaluate import evaluate_run, results_table
from pipeline.run.extract import extract
from pipeline.run.folder import RunFolder
from pipeline.study.comparison import compare_runs
from tests import tiny
from tests.commands import sail

ALL = (
    'eval.zero_shot=["test"]',
    'eval.knn=["test"]',
    'eval.compositional=["test"]',
    'eval.templates=["the {}", "a {} circle"]',
    'eval.alignment=["test"]',
    'eval.multi_label={test="marks/*_test.txt"}',
    "eval.alignment_k=3",
    "eval.linear_probe_rows=1000",
)
ALIGNMENT = ("cka", "cka_debiased", "mutual_knn", "cknna")
CLASSES = ("red", "green", "blue", "star", "square")  # words that the tiny tokenizer knows
LABELS = np.arange(1000, 1016) % 5
WAYS = ("image_to_text", "text_to_image")
KNN = ("image_features", "image_embeddings", "cross_modal")
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose features and head are there."""
    run_file = tiny.world(tmp_path_factory.mktemp("world"), rows=48)
    names = run_file.parent / "shards" / "classes.txt"
    names.write_text("".join(f"{name}\n" for name in CLASSES))
    (run_file.parent / "marks").mkdir()
    for label, name in enumerate(CLASSES):
        marks = [f"{1000 + i:05d} {mark:2d}" for i, mark in enumerate(marks_of(label))]
        (run_file.parent / "marks" / f"{name}_test.txt").write_text("\n".join(marks))
    config = load_config(str(run_file))
    extract(config, StopRequest())
    align_run(config, StopRequest())
    return run_file


def marks_of(label: int) -> list[int]:
    """A picture shows its class and the next one; the last picture is left out of the first."""
    shown = [label in (each, (each + 1) % 5) for each in LABELS]
    return [0 if label == 0 and i == 15 else 2 * each - 1 for i, each in enumerate(shown)]


class Run:
    """A run of its own, that shares the features and has its own copy of the head."""

    def __init__(self, run_file: Path, folder: Path) -> None:
        self.run_file, self.folder = run_file, folder
        self.path = folder / "eval" / "results.json"
        self.model, _ = load_head(folder / "align" / "best")

    def config(self, *overrides: str) -> RunConfig:
        places = [f"run.dir='{self.folder}'", f"run.features='{self.run_file.parent / 'run'}'"]
        return load_config(str(self.run_file), [*places, *overrides])

    def results(self, *overrides: str) -> Rows:
        assert evaluate_run(self.config(*overrides), StopRequest()) == self.path
        return self.written

    @property
    def written(self) -> Rows:
        """What results.json holds."""
        results: Rows = json.loads(self.path.read_text(encoding="utf-8"))["results"]
        return results

    @property
    def report(self) -> str:
        return (self.folder / "eval" / "report.html").read_text(encoding="utf-8")

    def features(self, column: str, split: str = "test") -> torch.Tensor:
        store = FeatureStore.open(RunFolder(self.run_file.parent / "run").store(split))
        return torch.from_numpy(store.column(column).read(0, store.rows))

    def images(self) -> torch.Tensor:
        return F.normalize(self.model.embed_image(self.features("image/vit")), dim=-1)

    def captions(self, field: str) -> torch.Tensor:
        return F.normalize(self.model.embed_text(self.features(f"text/bert/{field}")), dim=-1)


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Run:
    shutil.copytree(world.parent / "run" / "align", tmp_path / "align", symlinks=True)
    return Run(world, tmp_path)


@pytest.fixture(scope="module")
def measured(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of which every measure was taken; for tests that only read it."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(world.parent / "run" / "align", folder / "align", symlinks=True)
    run = Run(world, folder)
    run.results(*ALL)
    return run


@pytest.fixture
def measured_copy(measured: Run, tmp_path: Path) -> Run:
    """A copy of a run of which every measure was taken, to measure it again."""
    shutil.copytree(measured.folder, tmp_path / "copy", symlinks=True)
    return Run(measured.run_file, tmp_path / "copy")


def value(results: Rows, task: str, dataset: str, metric: str, **protocol: Any) -> float:
    (found,) = [
        row["value"]
        for row in results
        if (row["task"], row["dataset"], row["metric"]) == (task, dataset, metric)
        and protocol.items() <= row["protocol"].items()
    ]
    return float(found)


def test_every_measure_is_taken_and_named_as_the_contract_says(measured: Run) -> None:
    results = measured.written
    found = {(row["task"], row["metric"]) for row in results}
    assert found >= {
        ("zero_shot", "top1"),
        ("zero_shot", "mean_per_class"),
        *((f"retrieval/{way}", f"recall@{k}") for way in WAYS for k in (1, 5, 10)),
        *(("compositional", f"{name}_score") for name in ("text", "image", "group")),
        *((f"knn/{kind}", "knn_top1") for kind in KNN),
        ("linear_probe/vit", "linear_probe_top1"),
        *(("alignment/vit|bert/long", measure) for measure in ALIGNMENT),
        *(("alignment/embeddings", measure) for measure in ALIGNMENT),
    }
    primary = {measure.name: measure.metric for measure in MEASURES if not measure.sections}
    assert {task.partition("/")[0] for task, _ in found} == primary.keys()
    for name, metric in primary.items():
        assert metric in {each for task, each in found if task.partition("/")[0] == name}
    for row in results:
        if row["task"].startswith(("alignment/", "leaks")):
            continue  # may be below 0; is counted, not estimated
        low, high = row["ci95"]
        assert 0 <= low <= high <= 1
        assert row["n"] in (8, 16)
        assert row["encoders"]["image"] == "vit"
        assert 0 < row["protocol"]["chance"] < 1
    table = results_table(measured.folder / "eval" / "results.json").splitlines()
    assert "alignment/vit|bert/long" in [line.rstrip() for line in table]
    assert max(map(len, table)) <= 80


def test_average_precision_equals_its_definition(measured: Run) -> None:
    found = {
        (row["dataset"], row["metric"]): row["value"]
        for row in measured.written
        if row["task"] == "multi_label"
    }
    settings = measured.config().encoders.text["bert"]
    encoder = load_text_encoder("bert", settings, torch.device("cpu"))
    wholes, elevens = [], []
    for label, name in enumerate(CLASSES):
        texts = [f"the {name}", f"a {name} circle"]
        vectors = torch.from_numpy(encoder.encode(texts).astype(np.float16))
        mean = F.normalize(measured.model.embed_text(vectors), dim=-1).mean(dim=0)
        cosines = (measured.images() @ F.normalize(mean, dim=-1)).detach().numpy()
        marks = np.array(marks_of(label))
        order = sorted(np.flatnonzero(marks), key=lambda i: -cosines[i])
        shown = marks[order] > 0
        precisions = [shown[: i + 1].mean() for i in range(len(order))]
        wholes.append(np.mean([precisions[i] for i in np.flatnonzero(shown)]))
        recalls = np.cumsum(shown) / shown.sum()
        best = [max(np.array(precisions)[recalls >= t / 10 - 1e-9]) for t in range(11)]
        elevens.append(np.mean(best))
        assert found[f"test/{name}", "ap"] == pytest.approx(wholes[-1])
    assert found["test", "map"] == pytest.approx(np.mean(wholes))
    assert found["test", "map_11_point"] == pytest.approx(np.mean(elevens))


def test_retrieval_equals_its_definition_on_the_features_of_the_store(measured: Run) -> None:
    results = measured.written
    cosine = (measured.images() @ measured.captions("long").T).numpy()
    for way, scores in zip(WAYS, (cosine, cosine.T), strict=True):
        wrong = scores.copy()
        np.fill_diagonal(wrong, -2)
        ranks = (wrong >= np.diag(scores)[:, None] - 1e-6).sum(axis=1)
        for k in (1, 5, 10):
            found = value(results, f"retrieval/{way}", "test/long", f"recall@{k}")
            assert found == pytest.approx(np.mean(ranks < k))


def test_alignment_is_that_of_the_features_of_the_store_with_its_null_beside_it(run: Run) -> None:
    results = run.results(*ALL, 'eval.alignment_measures=["cka", "cka_rbf"]')
    image, text = run.features("image/vit").numpy(), run.features("text/bert/long").numpy()
    task = "alignment/vit|bert/long"
    assert value(results, task, "test", "cka") == pytest.approx(LinearCka(image, text)())
    assert value(results, task, "test", "cka_rbf") == pytest.approx(RbfCka(image, text)())
    (row,) = [each for each in results if (each["task"], each["metric"]) == (task, "cka")]
    protocol = row["protocol"]
    null = protocol["chance"]
    assert protocol["calibrated"] == pytest.approx((row["value"] - null) / (1 - null))
    assert 0 < protocol["p_value"] <= 1
    assert row["n"] == 16
    assert "calibrated" in run.report


def test_alignment_of_too_few_rows_is_left_out_with_a_note(run: Run) -> None:
    results = run.results('eval.alignment=["test"]', "eval.alignment_k=10")
    assert not [row for row in results if row["task"].startswith("alignment/")]
    assert "too few for k = 10" in run.report


def test_alignment_leaves_out_an_encoder_that_was_not_extracted(run: Run) -> None:
    results = run.results(*ALL, "encoders.text.other.model='bert'")
    tasks = {row["task"] for row in results if row["task"].startswith("alignment/")}
    assert tasks == {"alignment/vit|bert/long", "alignment/embeddings"}


def test_alignment_and_the_linear_probe_can_be_switched_off(run: Run) -> None:
    results = run.results(*ALL, "eval.alignment_measures=[]", "eval.linear_probe_rows=0")
    assert not [row for row in results if row["task"].startswith(("alignment", "linear"))]


def test_zero_shot_equals_its_definition_with_prompts_encoded_anew(measured: Run) -> None:
    results = measured.written
    settings = measured.config().encoders.text["bert"]
    encoder = load_text_encoder("bert", settings, torch.device("cpu"))
    prompts = [prompt for name in CLASSES for prompt in (f"the {name}", f"a {name} circle")]
    features = torch.from_numpy(encoder.encode(prompts).astype(np.float16))
    embedded = F.normalize(measured.model.embed_text(features), dim=-1)
    classes = F.normalize(embedded.view(5, 2, -1).mean(1), dim=-1)
    assert (classes @ classes.T).fill_diagonal_(0).max() < 1 - 1e-4  # no two classes are the same
    right = ((measured.images() @ classes.T).argmax(1).numpy() == LABELS).astype(float)
    assert value(results, "zero_shot", "test", "top1") == pytest.approx(right.mean())
    by_class = [right[label == LABELS].mean() for label in range(5)]
    found = value(results, "zero_shot", "test", "mean_per_class")
    assert found == pytest.approx(np.mean(by_class))


def test_knn_equals_its_definition_on_the_features_of_the_store(measured: Run) -> None:
    results = measured.written
    query, voters = (
        F.normalize(measured.features("image/vit", split).float(), dim=-1)
        for split in ("test", "train")
    )
    cosine, rows = (each.numpy() for each in (query @ voters.T).topk(3, dim=1))
    votes = np.zeros((16, 5))
    for neighbour in range(3):
        votes[np.arange(16), rows[:, neighbour] % 5] += np.exp(cosine[:, neighbour] / 0.07)
    found = value(results, "knn/image_features", "test", "knn_top1", k=3)
    assert found == pytest.approx(np.mean(votes.argmax(1) == LABELS))


def test_captions_with_the_same_words_count_as_right_only_when_asked(run: Run) -> None:
    own = run.results()
    assert "word for word" in run.report
    both = run.results('eval.retrieval_positives="identical"')
    task = ("retrieval/image_to_text", "test/short", "recall@1")
    assert value(own, *task) == 0  # every short caption is that of three images at least
    assert value(both, *task) > 0
    assert "word for word" not in run.report


def test_a_second_evaluation_does_nothing_and_a_changed_setting_measures_again(run: Run) -> None:
    run.results()
    results = run.folder / "eval" / "results.json"
    before = results.stat().st_mtime_ns
    run.results()
    assert results.stat().st_mtime_ns == before
    run.results("eval.seed=7")
    assert results.stat().st_mtime_ns != before


def test_prompts_are_encoded_once(measured_copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.encoders.load_text_encoder", lambda *_: pytest.fail("loaded"))
    measured_copy.results(*ALL, "eval.seed=3")


def test_the_report_shows_pictures_and_the_numbers_do_without_the_shards(
    measured_copy: Run, tmp_path: Path
) -> None:
    run = measured_copy
    with_pictures = run.written
    assert "data:image/jpeg;base64," in run.report
    shards = run.run_file.parent / "shards"
    shards.rename(tmp_path / "away")
    try:
        assert run.results(*ALL, 'report.title="again"') == with_pictures
    finally:
        (tmp_path / "away").rename(shards)
    assert "cannot be read" in run.report
    assert "data:image/jpeg;base64," not in run.report


def test_a_head_of_mixed_splits_is_measured_on_what_it_was_not_trained_on(tmp_path: Path) -> None:
    config = load_config(str(tiny.mixed_world(tmp_path)))
    extract(config, StopRequest())
    align_run(config, StopRequest())
    results = read_results(evaluate_run(config, StopRequest()))
    assert any(result.task.startswith("compositional") for result in results)
    assert {result.dataset.partition("/")[0] for result in results} == {"test"}


def test_a_k_beyond_the_reference_is_left_out_and_said(run: Run) -> None:
    results = run.results('eval.knn=["test"]', "eval.knn_k=[3, 5000]")
    assert {row["protocol"]["k"] for row in results if row["task"].startswith("knn/")} == {3}
    assert "k-NN with k = 5000 is left out" in run.report


def test_a_head_of_another_encoder_is_refused_by_the_field(run: Run) -> None:
    file = run.folder / "align" / "best" / "config.json"
    document = json.loads(file.read_text())
    document["run"]["image"]["fingerprint"]["pooling"] = "mean"
    document["sha256"] = {}
    file.write_text(json.dumps(document))
    with pytest.raises(EvaluationError, match="pooling = 'cls', but the head was trained"):
        run.results()


def test_a_head_that_the_settings_do_not_describe_is_said_and_measured(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run.results("eval.alignment_measures=[]")
    assert "align.head" not in caplog.text
    assert run.results("eval.alignment_measures=[]", "align.head.dim=9") == expected
    assert "align.head.dim is 9, but" in caplog.text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('eval.retrieval_fields=["shrt"]', r"eval.retrieval_fields names \['shrt'\]"),
        ('eval.compositional_fields=["x"]', r"eval.compositional_fields names \['x'\]"),
        ('eval.knn=["train"]', "eval.knn names 'train'"),
        ("eval.templates=['a photo']", "which has no place for the class name"),
    ],
)
def test_a_measure_that_cannot_be_taken_is_refused(run: Run, override: str, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        run.results('eval.zero_shot=["test"]', override)


def test_a_signal_leaves_the_results_of_before(run: Run) -> None:
    run.results()
    before = (run.folder / "eval" / "results.json").read_bytes()
    with pytest.raises(Stopped):
        evaluate_run(run.config("eval.seed=9"), StopRequest(signal_number=15))
    assert (run.folder / "eval" / "results.json").read_bytes() == before


def test_earlier_numbers_are_shown_as_such(run: Run, tmp_path: Path) -> None:
    reference = tmp_path / "earlier.json"
    reference.write_text('[{"what": "top-1 on raw pixels", "value": 0.062}]')
    run.results(f"report.reference='{reference}'")
    assert "top-1 on raw pixels" in run.report
    assert "Recorded earlier, not from this run" in run.report


def test_what_every_item_scored_sums_up_to_the_numbers_and_compares_runs(
    measured: Run, tmp_path: Path
) -> None:
    run = measured
    every = read_results(run.folder / "eval" / "results.json")
    no_sums = ("alignment/", "leaks", "multi_label")
    read = [each for each in every if not each.task.startswith(no_sums)]
    items = read_items(run.folder / "eval" / "items.npz")
    assert set(items) == {result.name for result in read}
    assert len(items) == len(read)
    for result in read:
        found = items[result.name]
        assert found.rows is not None
        assert len(found.rows) == len(found.hits) == result.n
        counts = np.ones_like(found.hits) if found.counts is None else found.counts
        classes = np.zeros_like(counts) if found.classes is None else found.classes
        shares = [
            found.hits[classes == each].sum() / counts[classes == each].sum()
            for each in np.unique(classes)
        ]
        assert np.mean(shares) == pytest.approx(result.value), result.name
    sail("compare", str(run.folder), str(run.folder), "--plot", str(tmp_path / "c.png"))
    document = compare_runs(run.folder, run.folder)
    compared = {each.name for each in every if not each.is_detail}
    assert {row["measure"] for row in document["measures"]} == compared
    paired = [row for row in document["measures"] if row["paired"]]
    assert {row["measure"] for row in paired} == set(items)
    assert all(row["ci95"] == (0, 0) for row in paired)
