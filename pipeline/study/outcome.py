"""The paper's question as a command: what, measured before training, predicts alignment.

run_dir/study/study.json, study.md, study.png
run_dir/study/measures.json    what was measured, by what it was measured on
run_dir/study/probes/          see `probes`
"""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.table import Table

from evaluate.measures.knn import KnnSettings
from evaluate.statistics import LEAST_POINTS, correlate, percentile_interval
from features.errors import ConfigError
from features.storage.files import appearing, write, write_json
from features.storage.reading import Expected, read_text, reading
from pipeline.interrupt import StopRequest
from pipeline.run.config import RunConfig
from pipeline.run.folder import stage_lock
from pipeline.study.probes import (
    Kept,
    Probe,
    draws,
    measure_images,
    measure_pairs,
    probe_folder,
    probe_pairs,
    scored_rows,
    usable_rows,
)
from pipeline.tables import numbers, rendered, words

COLUMNS = 4
RESAMPLES, SEED = 2000, 0
logger = logging.getLogger(__name__)
SCHEMA = 1
Scores = dict[str, dict[str, float]]
Series = dict[tuple[str, str], list[tuple[float, float]]]
"""Value and alignment of every point, by measure and what the points are."""


def study_table(document: dict[str, Any]) -> str:
    """Return what `sail study` prints: what predicts alignment, the strongest first."""
    if not document["correlations"]:
        return (
            f"Nothing can be correlated: that needs {LEAST_POINTS} encoders, or pairs of them, "
            f"that differ; there are {len(document['pairs'])} pairs. The page ranks them."
        )
    right = numbers("n", "Pearson (95 %)", "without one", "Spearman (95 %)", no_wrap=True)
    table = Table(*words("measure", "over"), *right)
    for row in document["correlations"]:
        table.add_row(row["measure"], row["over"], *_correlation(row))
    return rendered(table)


def study_page(document: dict[str, Any]) -> str:
    """Return study.md: correlations, encoders, and the ranking of the pairs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,  # the page is Markdown
    )
    functions = {"correlation": _correlation, "measured": _measured, "percent": _percent}
    return environment.get_template("study.md.j2").render(document, **functions)


def study_plot(document: dict[str, Any], path: Path) -> None:
    """Draw alignment over every measure."""
    rows = document["correlations"]
    height = -(-max(len(rows), 1) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.8 * height), layout="constrained")
    for number, row in enumerate(rows, 1):
        axes = figure.add_subplot(height, COLUMNS, number)
        x, y = zip(*row["points"], strict=True)
        axes.scatter(x, [100 * value for value in y], s=14)
        axes.set_title(f"r = {row['pearson']:.2f}, n = {row['n']}", fontsize=9)
        axes.set_xlabel(f"{row['measure']}, {row['over']}", fontsize=8)
        axes.set_ylabel("recall@10, %", fontsize=8)
        axes.grid(alpha=0.3)
    with appearing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _correlation(row: dict[str, Any]) -> list[str]:
    spearman = f"{row['spearman']:.2f}"
    if row["spearman_interval"] is not None:
        spearman += " ({:.2f} … {:.2f})".format(*row["spearman_interval"])
    return [
        str(row["n"]),
        "{:.2f} ({:.2f} … {:.2f})".format(row["pearson"], *row["pearson_interval"]),
        f"{min(row['without_one']):.2f} … {max(row['without_one']):.2f}",
        spearman,
    ]


def _measured(found: dict[str, Any], form: str, scale: float = 1) -> str:
    """Return a value with its interval and its seconds."""
    doubt = "–".join(form.format(scale * edge) for edge in found["ci95"] or ())
    inside = [*filter(None, [doubt]), f"{found['seconds']:.1f} s"]
    return f"{form.format(scale * found['value'])} ({', '.join(inside)})"


def _percent(value: float, interval: list[float]) -> str:
    return f"{100 * value:.1f} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"


def pick_run(config: RunConfig, on: str | None, stop: StopRequest) -> Path:
    """Probe every pair, and say which is the best and how sure that is; return pick.json.

    Args:
        config: The recipe, whose features are there.
        on: Split to score on; the held-out rows of the training split if not given.
        stop: Whether to stop.

    Raises:
        Stopped: A signal came; the same call goes on from here.
    """
    with stage_lock(config, "study"):
        return _pick(config, on, stop)


def _pick(config: RunConfig, on: str | None, stop: StopRequest) -> Path:
    rows, probes = probe_pairs(config, on, stop)
    document = {
        "schema": 1,
        "scored_on": on or f"held-out rows of {config.align.split}",
        "images": len(rows.rows),
        "resamples": RESAMPLES,
        "pairs": ranking(probes),
    }
    path = probe_folder(config) / "pick.json"
    write_json(path, document)
    return path


def ranking(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """Rank pairs by recall@10, each with its interval and how probably it is the best of all.

    All pairs are scored on the same draws of the images, so that images that are hard for all do
    not blur the order. Pairs that are equally good in a draw share it.
    """
    drawn = draws(len(probes[0].items["image_to_text"].hits), resamples=RESAMPLES, seed=SEED)
    recalls = np.stack([probe.recall(drawn) for probe in probes])  # (pairs, resamples)
    is_best = recalls == recalls.max(axis=0)
    shares = (is_best / is_best.sum(axis=0)).mean(axis=1)
    rows = [
        {
            "image": probe.image,
            "text": probe.text,
            "recall@10": float(probe.recall()[0]),
            "ci95": list(percentile_interval(of_probe)),
            "probability_best": float(share),
            "seconds": probe.seconds,
        }
        for probe, of_probe, share in zip(probes, recalls, shares, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["recall@10"])


def pick_table(document: dict[str, Any]) -> str:
    """Return what `sail pick` prints."""
    right = numbers("recall@10, %", "95 %", "best with probability", no_wrap=True)
    table = Table(*words("image", "text"), *right)
    for row in document["pairs"]:
        low, high = row["ci95"]
        table.add_row(
            row["image"],
            row["text"],
            f"{100 * row['recall@10']:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            f"{row['probability_best']:.2f}",
        )
    best = document["pairs"][0]
    doubt = [row for row in document["pairs"][1:] if row["probability_best"] >= 0.05]
    lines = [rendered(table), f"Best: {best['image']} with {best['text']}."]
    if doubt:
        names = ", ".join(f"{row['image']} with {row['text']}" for row in doubt)
        lines.append(f"Not told apart from it by {document['images']:,} images: {names}.")
    return "\n".join(lines)


def study_run(
    config: RunConfig,
    stop: StopRequest,
    *,
    on: str | None = None,
    scores: Path | None = None,
) -> Path:
    """Measure every encoder and pair, align every pair shortly, and correlate; return study.json.

    Args:
        config: The recipe, whose features are there.
        stop: Whether to stop.
        on: Split to score alignment on; the held-out rows of the training split if not given.
        scores: CSV of scores from elsewhere: a column `encoder`, and a column per score.

    Raises:
        ConfigError: The scores are not of encoders of the recipe, or there is nothing to score on.
        EvaluationError: A column is not complete, or too few rows are left.
        Stopped: A signal came; the same call goes on from here.
    """
    outside = {} if scores is None else read_scores(scores, config)
    scored_rows(config, on)
    usable_rows(config, config.align.split)
    with stage_lock(config, "study"):
        return _study(config, stop, on, outside)


def _study(config: RunConfig, stop: StopRequest, on: str | None, outside: Scores) -> Path:
    folder = probe_folder(config)
    kept = Kept.read(folder / "measures.json")
    splits = _labelled_splits(config)
    images = {} if splits is None else measure_images(config, splits, kept, stop)
    rows, probes = probe_pairs(config, on, stop)
    measures = {(image, text): found for image, text, found in measure_pairs(config, kept, stop)}
    pairs = [row | {"measures": measures[row["image"], row["text"]]} for row in ranking(probes)]
    document = {
        "schema": SCHEMA,
        "scored_on": on or f"held-out rows of {config.align.split}",
        "images": len(rows.rows),
        "rows_sha256": rows.sha256,
        "probe": {"steps": config.align.steps, "batch_size": config.align.batch_size},
        "labelled": splits,
        "encoders": images,
        "scores": outside,
        "pairs": pairs,
        "correlations": correlations(pairs, images, outside),
    }
    path = folder / "study.json"
    study_plot(document, path.with_suffix(".png"))
    write(path.with_suffix(".md"), study_page(document).encode())
    write_json(path, document)
    return path


def read_scores(path: Path, config: RunConfig) -> Scores:
    """Read scores from elsewhere, by encoder; an empty cell is no score.

    Raises:
        ConfigError: A line is not of an encoder of the recipe, or a score is no number.
    """
    known = [*config.encoders.image_columns, *config.encoders.text_columns]
    scores: Scores = {}
    expected = Expected("A table of scores, as .csv in UTF-8", "Correct --scores.", ConfigError)
    text = read_text(path, expected)
    with reading(path, expected):
        lines = list(csv.DictReader(io.StringIO(text, newline="")))
    for number, line in enumerate(lines, 2):
        name = line.pop("encoder", None)
        if name not in known:
            raise ConfigError(
                f"{path}, line {number}, has encoder = {name!r}. Give the name of one of the "
                f"recipe's: {known}."
            )
        try:
            scores[name] = {key: float(value) for key, value in line.items() if value}
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}, line {number}, is not all numbers: {error}. Put a number or nothing "
                f"in every column but `encoder`."
            ) from error
    return scores


def correlations(
    pairs: Sequence[Mapping[str, Any]],
    images: Mapping[str, Mapping[str, Any]],
    outside: Scores,
) -> list[dict[str, Any]]:
    """Correlate every measure with the alignment reached, the strongest first.

    Measures of one encoder go with the mean alignment over its partners, so that the points are
    the encoders; measures of a pair go with that of the pair.
    """
    rows = []
    for (measure, over), points in (
        _of_encoders(pairs, images, outside) | _of_pairs(pairs)
    ).items():
        first, second = np.array(points).T
        found = correlate(first, second, resamples=RESAMPLES, seed=SEED)
        if found is None:
            what = "%s is not correlated: it has %d %s, and %d that are not all alike are needed"
            logger.warning(what, measure, len(points), over, LEAST_POINTS)
        else:
            rows.append({"measure": measure, "over": over, "points": points} | asdict(found))
    return sorted(rows, key=lambda row: -abs(float(row["pearson"])))


def _of_encoders(
    pairs: Sequence[Mapping[str, Any]],
    images: Mapping[str, Mapping[str, Any]],
    outside: Scores,
) -> Series:
    series: Series = {}
    for kind in ("image", "text"):
        for name in dict.fromkeys(pair[kind] for pair in pairs):
            reached = float(np.mean([p["recall@10"] for p in pairs if p[kind] == name]))
            own = {key: found["value"] for key, found in images.get(name, {}).items()}
            for measure, value in (own | outside.get(name, {})).items():
                series.setdefault((measure, f"{kind} encoders"), []).append((value, reached))
    return series


def _of_pairs(pairs: Sequence[Mapping[str, Any]]) -> Series:
    series: Series = {}
    for pair in pairs:
        for measure, found in pair["measures"].items():
            values = {measure: found["value"], f"{measure} (calibrated)": found["calibrated"]}
            for name, value in values.items():
                series.setdefault((name, "pairs"), []).append((value, pair["recall@10"]))
    return series


def _labelled_splits(config: RunConfig) -> tuple[str, str] | None:
    """Return the splits of k-NN and the linear probe: those that [eval] names, or none."""
    settings = config.eval.of(KnnSettings)
    if not settings.knn:
        return None
    return settings.knn[0], settings.knn_reference or config.align.split
