"""Many trainings of one recipe on its features: every combination of some settings, by seeds.

Each training is a run folder of its own under that of the recipe, and resumes by itself; what was
found so far is written after each.

    run_dir/sweep/sweep.json, sweep.png                what every run scored; mean and sd
    run_dir/sweep/learning_rate=0.001,seed=0-1a2b3c4d  one run
"""

import hashlib
import json
import logging
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from align.checkpoint import Checkpoint
from evaluate.measures import measure_of
from evaluate.results import read_results
from features.errors import ConfigError, TrainingError
from features.storage.files import appearing, write_json
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import RunConfig, vary_config
from pipeline.run.evaluate import evaluate_run
from pipeline.run.folder import stage_lock
from pipeline.study.gains import ROWS, gains_of
from pipeline.tables import numbers, rendered, words

CHOSEN = "heldout/recall@10"
SHOWN = ("top1", "recall@10")  # ends of the names of what an evaluation adds to the picture
PANELS = 6
logger = logging.getLogger(__name__)
SCHEMA = 1
HELDOUT = ("recall@1", "recall@5", "recall@10")
Settings = dict[str, str]


def sweep_table(document: dict[str, Any]) -> str:
    """Return what `sail sweep` prints: mean ± sd over the seeds, in per cent."""
    right = numbers("% (mean ± sd)", "seeds", no_wrap=True)
    table = Table(*words(*document["over"], "measure"), *right)
    for row in document["summary"]:
        settings = list(row["settings"].values())
        for name, score in row["scores"].items():
            spread = "" if score["sd"] is None else f" ± {100 * score['sd']:.1f}"
            table.add_row(*settings, name, f"{100 * score['mean']:.1f}{spread}", str(score["n"]))
        if row["failed"]:
            table.add_row(*settings, "failed; see `runs` in the JSON", "–", str(row["failed"]))
    return "\n".join([rendered(table), *document["gains"]])


def sweep_plot(document: dict[str, Any], path: Path) -> None:
    """Draw the scores: over a number, if one alone is varied, and else one bar per combination."""
    rows = [row for row in document["summary"] if row["scores"]]
    names = list(rows[0]["scores"])
    panels = [CHOSEN, *(n for n in names if n.endswith(SHOWN) and not n.startswith("heldout"))]
    panels = panels[:PANELS]
    numbers = _numbers(document["over"])
    height = 3.2 if numbers else 1.2 + 0.35 * len(rows)
    figure = Figure(figsize=(5.5, height * len(panels)), layout="constrained")
    for number, name in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, number)
        if numbers:
            _over_a_number(axes, rows, name, next(iter(document["over"])))
        else:
            _by_combination(axes, rows, name)
    with appearing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _numbers(over: dict[str, list[str]]) -> bool:
    """Whether one setting alone is varied, over positive numbers."""
    if len(over) != 1:
        return False
    (values,) = over.values()
    try:
        return all(float(value) > 0 for value in values)
    except ValueError:
        return False


def _over_a_number(axes: Axes, rows: list[dict[str, Any]], name: str, setting: str) -> None:
    points = [(float(row["settings"][setting]), row["scores"][name]) for row in rows]
    points.sort(key=lambda point: point[0])  # 0.1 and 1e-1 are two settings in one place
    x = [value for value, _ in points]
    means, spreads = _percent([score for _, score in points])
    axes.errorbar(x, means, yerr=spreads, marker="o", capsize=3)
    axes.set_xscale("log")
    axes.set_xlabel("image–text pairs" if setting == ROWS else setting)
    axes.set_ylabel(f"{name}, %")
    axes.grid(alpha=0.3)


def _by_combination(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    means, spreads = _percent([row["scores"][name] for row in rows])
    labels = [
        ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row["settings"].items())
        for row in rows
    ]
    axes.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", capsize=3)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"{name}, %")
    axes.grid(axis="x", alpha=0.3)


def _percent(scores: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [100 * s["mean"] for s in scores], [100 * (s["sd"] or 0.0) for s in scores]


@dataclass(frozen=True)
class Sweep:
    """What is varied."""

    name: str
    """Of the folder and its files: `sweep` or `scaling`."""
    over: dict[str, list[str]]
    """Values of each setting, as they are written in a run file."""
    seeds: list[int]
    """Every combination is trained with each."""
    evaluates: bool = False
    """Whether each is measured by `sail eval` as well."""


@dataclass(frozen=True)
class Trial:
    """One training."""

    settings: Settings
    seed: int
    dir: str
    scores: dict[str, float] = field(default_factory=dict)
    """`heldout/recall@10`, and from an evaluation `task dataset metric`; fractions."""
    failed: str | None = None
    """Why there are no scores."""


def sweep_run(sweep: Sweep, config: RunConfig, stop: StopRequest) -> Path:
    """Train every combination that was not trained before; return the JSON of what they scored.

    A training that fails, as by a loss that is not finite, is noted and the others go on.

    Args:
        sweep: What is varied.
        config: What is the same in all of them.
        stop: Whether to stop.

    Raises:
        ConfigError: A setting cannot be varied, or there is nothing to compare by. All combinations
            are checked before the first is trained.
        TrainingError: None of them could be trained.
        LockedError: Another process runs such a sweep.
        Stopped: A signal came; the same call goes on from here.
    """
    _check(sweep)
    with stage_lock(config, sweep.name):
        return _run(sweep, config, stop)


def _run(sweep: Sweep, config: RunConfig, stop: StopRequest) -> Path:
    path = config.run.dir / sweep.name / f"{sweep.name}.json"
    planned = list(_planned(sweep, config))
    if any(varied.align.holdout == 0 for _, varied in planned):
        raise ConfigError(
            "align.holdout = 0 leaves no rows to compare the trainings by. Set it above 0."
        )
    done: list[Trial] = []
    for number, (trial, varied) in enumerate(planned, 1):
        logger.info("%s %d of %d: %s", sweep.name, number, len(planned), Path(trial.dir).name)
        done.append(_train(trial, varied, stop, evaluates=sweep.evaluates))
        if not all(trial.failed for trial in done):
            write_json(path, _document(sweep, done))
    if all(trial.failed for trial in done):
        raise TrainingError(f"None of {len(done)} trainings came to an end. {done[-1].failed}")
    sweep_plot(_document(sweep, done), path.with_suffix(".png"))
    return path


def _check(sweep: Sweep) -> None:
    if dist.is_torchelastic_launched():
        raise ConfigError(
            "This command was started by torchrun, but trains one run after the other in one "
            "process. Start it without torchrun."
        )
    if wrong := [key for key in sweep.over if not key.startswith("align.")]:
        raise ConfigError(
            f"--over {wrong[0]} cannot be varied: all trainings share the features of the run. "
            f"Name a setting of [align], as in `--over align.head.kind=glu,linear`."
        )
    varied: dict[str, Sequence[object]] = {**sweep.over, "--seeds": sweep.seeds}
    for name, values in varied.items():
        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(
                f"{name} has {twice[0]} more than once, and a training that is counted twice makes "
                f"the sd too small. Leave one out."
            )


def _planned(sweep: Sweep, config: RunConfig) -> Iterator[tuple[Trial, RunConfig]]:
    for values in product(*sweep.over.values()):
        settings = dict(zip(sweep.over, values, strict=True))
        for seed in sweep.seeds:
            folder = config.run.dir / sweep.name / _label(settings, seed)
            given = [f"{key}={value}" for key, value in settings.items()]
            varied = vary_config(config, folder, [*given, f"run.seed={seed}"])
            yield Trial(settings, seed, str(folder)), varied


def _label(settings: Settings, seed: int) -> str:
    """Return the name of a run: what a reader needs, and a hash of what is cut off."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.=,+-]", "_", ",".join(parts))[:90] + f",seed={seed}-{digest}"


def _train(trial: Trial, config: RunConfig, stop: StopRequest, *, evaluates: bool) -> Trial:
    stop.check()
    try:
        best = align_run(config, stop)
    except TrainingError as error:
        logger.warning("%s has no scores: %s", trial.dir, error)
        return replace(trial, failed=str(error))
    if best is None:
        raise Stopped
    heldout = Checkpoint.open(best).heldout
    scores = {f"heldout/{name}": heldout[name] for name in HELDOUT}
    if evaluates:
        for result in read_results(evaluate_run(config, stop)):
            measure = measure_of(result)
            # What comes in variants, as k-NN by k, has no single score.
            if not result.is_detail and not (measure and measure.variant(result)):
                scores[f"{result.task} {result.dataset} {result.metric}"] = result.value
    return replace(trial, scores=scores)


def _document(sweep: Sweep, done: list[Trial]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": sweep.name,
        "over": sweep.over,
        "seeds": sweep.seeds,
        "summary": summary(done),
        "gains": gains_of([asdict(trial) for trial in done], CHOSEN),
        "runs": [asdict(trial) for trial in done],
    }


def summary(trials: Sequence[Trial]) -> list[dict[str, object]]:
    """Return for each combination, in order, the mean and sd over its seeds of every score.

    The sd is that of a sample (n − 1), None where there is one seed alone.
    """
    combinations: dict[str, list[Trial]] = {}
    for trial in trials:
        combinations.setdefault(json.dumps(trial.settings), []).append(trial)
    rows: list[dict[str, object]] = []
    for members in combinations.values():
        scored = [trial for trial in members if trial.failed is None]
        scores = {}
        for name in scored[0].scores if scored else ():
            values = [trial.scores[name] for trial in scored]
            scores[name] = {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
        failed = len(members) - len(scored)
        rows.append({"settings": members[0].settings, "scores": scores, "failed": failed})
    return rows
