"""The benchmark scripts run, at sizes that take a moment; their numbers are not judged here."""

import json
from pathlib import Path

import pytest
import torch

from evaluate import nearest
from features.config import TextEncoderConfig
from features.encoders.nvembed import NVEmbed
from pipeline.planning.sizes import text_size
from tests import tiny
from tests.benchmarks import (
    alignment_measures,
    captions,
    decoding,
    demo,
    epoch,
    explore,
    extraction,
    extraction_memory,
    finished,
    formats,
    gpu,
    indexing,
    joining,
    knn,
    loader,
    loss,
    memory,
    retrieval,
    step,
    writer,
)
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.figures import BEGIN, END, OUTPUT, PAGE, table
from tests.benchmarks.nvembed import REAL, operations


def test_the_page_shows_the_figures_that_are_on_record() -> None:
    page = PAGE.read_text(encoding="utf-8")
    _, begin, rest = page.partition(BEGIN)
    shown, end, _ = rest.partition(END)
    assert begin
    assert end
    assert shown == table(json.loads(OUTPUT.read_text(encoding="utf-8"))) + "\n"


@pytest.mark.parametrize(
    ("values", "goal", "is_far"),
    [([0.8, 0.9, 1.0], 0.9, False), ([0.8, 0.9, 1.0], 1.05, False), ([0.8, 0.9, 1.0], 1.2, True)],
)
def test_a_goal_that_is_missed_by_more_than_the_spread_is_a_regression(
    values: list[float], goal: float, is_far: bool
) -> None:
    about = {"unit": "ratio", "direction": "min", "module": "none"}
    assert figure_of("rate", values, goal=goal, **about).is_far_from_goal == is_far


@pytest.mark.slow
def test_loader_benchmark_measures_ratios() -> None:
    figures = loader.measure(rows=32_768, rounds=1, batch_size=1024)
    assert [figure.value > 0 for figure in figures] == [True] * 6


@pytest.mark.slow
def test_memory_benchmark_measures_bytes_of_another_process() -> None:
    assert memory.peak_bytes(0.03, steps=2) > 50e6
    assert 0.3 < memory.loader_share(0.3, budget_mb=150, steps=10) < 2


@pytest.mark.slow
def test_formats_benchmark_measures_bytes_of_other_processes(tmp_path: Path) -> None:
    form, out, back = next(formats.peaks(tmp_path, rows=2000, dim=16))
    assert form == "hdf5"
    assert min(out, back) > 50e6


@pytest.mark.slow
def test_training_benchmarks_measure_shares_and_ratios() -> None:
    (ratio,) = epoch.measure(batches=[2048], rounds=1)
    assert ratio.value > 0
    (share,) = step.measure(rows=16_384, batch=64, steps=4, scale=16)
    assert 0 <= share.value <= 1


@pytest.mark.slow
def test_loss_benchmarks_measure_ratios() -> None:
    figures = loss.time_figures(64, 8, rounds=1)
    figures += loss.memory_figures(4096, 16, small=2048, large=4096, largest=4096)
    assert all(figure.value > 0 for figure in figures)


@pytest.mark.slow
def test_extraction_benchmark_measures_a_ratio_for_each_mode() -> None:
    figures = extraction.measure(images=2, rounds=1, batch_size=2)
    assert [figure.value > 0 for figure in figures] == [True, True]


@pytest.mark.slow
def test_decoding_benchmark_measures_ratios() -> None:
    figures = decoding.measure(images=2, rounds=1)
    assert [figure.value > 0 for figure in figures] == [True, True, True]


@pytest.mark.slow
def test_demo_benchmark_measures_seconds() -> None:
    small = ["data.train.rows=64", "data.test.rows=60", "data.compositional.rows=4"]
    small += ["align.batch_size=32", "align.epochs=1", "eval.segmentation={}", "eval.bootstrap=0"]
    everything, evaluation = demo.measure(small, rounds=1)
    assert everything.value > evaluation.value > 0


@pytest.mark.slow
def test_extraction_memory_benchmark_measures_bytes_of_another_process(tmp_path: Path) -> None:
    tiny.image_encoder(tmp_path / "vit")
    tiny.text_encoder(tmp_path / "bert")
    shard = tiny.write_tar(tmp_path / "s.tar", tiny.samples(3))
    assert extraction_memory.peak_bytes(tmp_path, "few", [str(shard)]) > 50e6


@pytest.mark.slow
def test_finished_benchmark_measures_a_run_that_has_nothing_to_do() -> None:
    seconds, ratio = finished.measure(shards=2, samples=3, rounds=1)
    assert seconds.value > ratio.value * 0.1 > 0


@pytest.mark.slow
def test_indexing_and_writer_benchmarks_measure_ratios() -> None:
    figures = indexing.measure(samples=100, rounds=1) + writer.measure(
        5_000, 8, rounds=1, chunks_in_order=2
    )
    assert all(figure.value > 0 for figure in figures)


@pytest.mark.slow
def test_joining_benchmark_measures_bytes_of_another_process() -> None:
    peak, seconds = joining.measure(rows=50_000)
    assert 50 < peak.value < 300
    assert seconds.value > 0


@pytest.mark.slow
def test_caption_benchmarks_measure_padding_speed_and_drift() -> None:
    figures = captions.measure(count=20, rounds=1)
    values = {figure.figure: figure.value for figure in figures}
    assert values["caption tokens computed / real, mean 20"] == 1
    assert values["captions/s / released way, NV-Embed shape, mean 20"] > 0
    assert values["drift of a caption's vector with its batch, MiniLM, float32"] <= 1e-5


def test_the_work_of_nv_embed_is_what_sail_plan_counts() -> None:
    with torch.device("meta"):  # the real size, without its memory
        model = NVEmbed(REAL)
        model.latent.prepare()
    planned = text_size(TextEncoderConfig(model="nvidia/NV-Embed-v2")).flops
    assert planned
    for length in (1, 20, 512):
        assert operations(model, length) == pytest.approx(planned(length), rel=1e-12)


@pytest.mark.slow
def test_gpu_scripts_run_small_on_a_cpu(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    tiny_size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = extraction.random_dinov2(tmp_path / "dino", **tiny_size)
    task = extraction.Task(tmp_path, model, cpu, images=4, distinct=2, batch_size=2)
    figures = gpu.extraction_figures(task, rounds=1, compiled=False)
    figures += gpu.loss_figures(cpu, batches=[32], repeats=1)
    small_step = ["align.batch_size=8", "align.head.dim=8", "align.head.depth=1"]
    figures += gpu.step_figures(cpu, "sail", (16, 24), overrides=small_step, repeats=1)
    small = captions.SMALL
    figures += gpu.text_figures(cpu, torch.float32, config=small, count=4, peak=1e9, repeats=1)
    assert all(figure.value > 0 for figure in figures if "drift" not in figure.figure)


def test_a_figure_is_ok_on_the_right_side_of_its_goal() -> None:
    common = {"figure": "f", "unit": "u", "goal": 2.0, "n": 1, "spread": 0.0, "command": "c"}
    assert Figure(value=3.0, direction="min", **common).ok  # type: ignore[arg-type]
    assert not Figure(value=3.0, direction="max", **common).ok  # type: ignore[arg-type]


@pytest.mark.slow
def test_retrieval_benchmark_measures_a_ratio_and_seconds() -> None:
    figures = retrieval.measure(images=20, dim=8, rounds=1)
    assert [figure.unit for figure in figures] == ["ratio", "s"]
    assert all(figure.value > 0 for figure in figures)


@pytest.mark.slow
def test_alignment_benchmark_measures_seconds_and_bytes_of_another_process() -> None:
    seconds, peak = alignment_measures.measure(rows=500)
    assert "mutual_knn" in seconds.figure
    assert seconds.value > 0
    assert 0.05 < peak.value < 4


@pytest.mark.slow
def test_knn_benchmark_measures_a_ratio_and_bytes_of_another_process() -> None:
    ratio, peak, checked = knn.measure(queries=20, rows=100, checked_rows=500)
    assert ratio.value > 0
    assert checked.value > 0
    assert 0.05 < peak.value < 4


@pytest.mark.slow
def test_the_search_benchmark_measures_milliseconds_and_recall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"LISTS": 16, "LEARNED_FROM": 1024, "EXACT_BYTES": 1, "PROBES": 8}.items():
        monkeypatch.setattr(nearest, name, value)
    milliseconds, recall = explore.measure(rows=4096)
    assert (milliseconds.unit, recall.unit) == ("ms", "fraction")
    assert milliseconds.value > 0
    assert 0.5 < recall.value <= 1
