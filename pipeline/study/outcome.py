"""The paper's question as a command: what, measured before training, predicts alignment.

run_dir/study/study.json, study.md, study.png
run_dir/study/measures.json    what was measured, by what it was measured on
run_dir/study/probes/          see `probes`
"""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.correlation import LEAST_POINTS, correlate
from features.errors import ConfigError
from features.storage.files import write
from pipeline.config import RunConfig, load_config
from pipeline.interrupt import StopRequest
from pipeline.study.measures import Kept, measure_images, measure_pairs
from pipeline.study.output import study_page, study_plot
from pipeline.study.pick import ranking
from pipeline.study.probes import probe_folder, probe_pairs

logger = logging.getLogger(__name__)
SCHEMA = 1
RESAMPLES, SEED = 2000, 0
Scores = dict[str, dict[str, float]]
Series = dict[tuple[str, str], list[tuple[float, float]]]
"""Value and alignment of every point, by measure and what the points are."""


def study_run(
    recipe: str,
    overrides: Sequence[str],
    stop: StopRequest,
    *,
    on: str | None = None,
    scores: Path | None = None,
) -> Path:
    """Measure every encoder and pair, align every pair shortly, and correlate; return study.json.

    Args:
        recipe: The run file, whose features are there.
        overrides: Settings over it.
        stop: Whether to stop.
        on: Split to score alignment on; the held-out rows of the training split if not given.
        scores: CSV of scores from elsewhere: a column `encoder`, and a column per score.

    Raises:
        ConfigError: The scores are not of encoders of the recipe, or there is nothing to score on.
        EvaluationError: A column is not complete, or too few rows are left.
        Stopped: A signal came; the same call goes on from here.
    """
    config = load_config(recipe, overrides)
    outside = {} if scores is None else read_scores(scores, config)
    folder = probe_folder(config)
    kept = Kept.read(folder / "measures.json")
    splits = _labelled_splits(config)
    images = {} if splits is None else measure_images(config, splits, kept, stop)
    rows, probes = probe_pairs(recipe, overrides, on, stop)
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
    write(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def read_scores(path: Path, config: RunConfig) -> Scores:
    """Read scores from elsewhere, by encoder; an empty cell is no score.

    Raises:
        ConfigError: A line is not of an encoder of the recipe, or a score is no number.
    """
    known = [*config.encoders.image_columns, *config.encoders.text]
    scores: Scores = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            name = line.pop("encoder", None)
            if name not in known:
                raise ConfigError(
                    f"{path}, line {number}, has encoder = {name!r}. A column `encoder` with names "
                    f"of the recipe was expected: {known}. Correct the line."
                )
            try:
                scores[name] = {key: float(value) for key, value in line.items() if value}
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path}, line {number}, is not all numbers: {error}. A number or nothing was "
                    f"expected in every column but `encoder`. Correct the line."
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
    if not config.eval.knn:
        return None
    return config.eval.knn[0], config.eval.knn_reference or config.align.split
