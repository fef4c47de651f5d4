"""Stage three as a run: stores and a checkpoint in, results.json and report.html out."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from align.checkpoint import Checkpoint, differences, load_head
from evaluate.items import write_items
from evaluate.masks import MaskedPictures, open_masked
from evaluate.report import render
from evaluate.results import Result, read_results, write_results
from features.storage.files import write
from features.store import NOT_COMPARED, FeatureStore
from pipeline.config import RunConfig
from pipeline.device import prepare_device
from pipeline.embedding.rows import Embedder
from pipeline.evaluation.plan import Plan, make_plan
from pipeline.evaluation.report import make_report
from pipeline.interrupt import Stopped, StopRequest
from pipeline.measures import (
    Context,
    Findings,
    score_alignment,
    score_compositional,
    score_knn,
    score_linear_probe,
    score_retrieval,
    score_segmentation,
    score_zero_shot,
)
from pipeline.progress import timed
from pipeline.run import run_folder, start_run
from pipeline.stores import open_evaluated
from pipeline.tables import rendered

logger = logging.getLogger(__name__)
VERSION = 6  # raised when the same inputs give other results or another report


def evaluate_run(config: RunConfig, stop: StopRequest) -> Path:
    """Take every measure that the splits of a recipe allow; return the path of results.json.

    When nothing has changed since the last time, nothing is done.

    Raises:
        CheckpointError: There is no trained head.
        EvaluationError: A measure that is asked for cannot be taken.
        Stopped: A signal came; what an earlier evaluation wrote is as it was.
    """
    folder = run_folder(config)
    checkpoint_path = folder.align / config.eval.checkpoint
    checkpoint = Checkpoint.open(checkpoint_path)
    if "imported" not in checkpoint.run:
        _say_other_head(checkpoint, config)
    stores = {split: open_evaluated(config, folder, split) for split in config.data}
    masked = {
        name: open_masked(settings, max_pixels=config.extract.max_pixels)
        for name, settings in config.eval.segmentation.items()
    }
    results, report = folder.eval / "results.json", folder.eval / "report.html"
    plan = make_plan(config.eval, config.trained_splits, stores)
    start_run(config)
    inputs = folder.eval / "inputs.sha256"
    digest = _digest(config, plan, checkpoint, stores, masked)
    written = results.is_file() and report.is_file() and inputs.is_file()
    if written and inputs.read_text(encoding="utf-8").strip() == digest:
        logger.info("%s is up to date", results)
        return results
    folder.eval.mkdir(parents=True, exist_ok=True)
    device = prepare_device(config.run)
    model, checkpoint = load_head(checkpoint_path, device)
    embedder = Embedder(model, checkpoint, device)
    context = Context(config, folder, stores, embedder, Findings())
    _measure(context, plan, masked, stop)
    page = render(make_report(context, plan, folder.align / "metrics.jsonl"))
    inputs.unlink(missing_ok=True)  # from here on the files may not belong together
    write_items(folder.eval / "items.npz", context.findings.items)
    write_results(
        results,
        run=config.run.name,
        checkpoint_sha256=checkpoint.sha256,
        results=context.findings.results,
    )
    write(report, page.encode())
    write(inputs, f"{digest}\n".encode())
    return results


def results_table(path: Path) -> str:
    """Return what `sail eval` prints: the numbers of a results.json, task by task."""
    tasks: dict[str, list[Result]] = {}
    for result in read_results(path):
        if not result.is_detail:
            tasks.setdefault(result.task, []).append(result)
    table = Table(box=None, pad_edge=False)
    table.add_column(overflow="fold")
    for heading in ("%", "95 %", "chance", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, results in tasks.items():
        table.add_row(Text(task, "bold"))
        width = max(len(result.dataset) for result in results)
        for result in results:
            name = f"  {result.dataset:<{width}}  {_metric(result)}"
            table.add_row(Text(name), *_numbers(result))
    return rendered(table)


def _metric(result: Result) -> str:
    if result.metric == "knn_top1":
        return f"{result.metric}, k = {result.protocol['k']}, {result.encoders['image']}"
    return result.metric


def _numbers(result: Result) -> tuple[str, str, str, str]:
    return (
        f"{100 * result.value:z.1f}",
        "–".join(f"{100 * end:z.1f}" for end in result.ci95 or ()),
        "" if result.chance is None else f"{100 * result.chance:z.1f}",
        f"{result.n:,}",
    )


def _say_other_head(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Say in the log where a trained head is not the one that the settings describe."""
    settings = config.align.head.model_dump(mode="json")
    for name, found, expected in differences(checkpoint.run["align"]["head"], settings):
        logger.warning(
            "align.head.%s is %r, but %s was trained with %r, and is measured as it was trained",
            name,
            expected,
            checkpoint.path,
            found,
        )


def _measure(
    context: Context, plan: Plan, masked: dict[str, MaskedPictures], stop: StopRequest
) -> None:
    work = [
        *(("zero-shot", score_zero_shot, split) for split in plan.zero_shot),
        *(("retrieval", score_retrieval, split) for split in plan.retrieval),
        *(("compositional", score_compositional, split) for split in plan.compositional),
        *(("alignment", score_alignment, split) for split in plan.alignment),
    ]
    for name, measure, split in work:
        with timed(f"{name} on {split}"):
            measure(context, split)
        if stop():
            raise Stopped
    for split in plan.knn:
        with timed(f"k-NN on {split}"):
            score_knn(context, split, plan.knn_reference)
        if stop():
            raise Stopped
    if plan.knn and context.config.eval.linear_probe_rows:
        with timed("linear probe"):
            score_linear_probe(context, plan.knn, plan.knn_reference)
    for name, pictures in masked.items():
        with timed(f"segmentation of {name}"):
            score_segmentation(context, name, pictures, stop)


def _digest(
    config: RunConfig,
    plan: Plan,
    checkpoint: Checkpoint,
    stores: dict[str, FeatureStore],
    masked: dict[str, MaskedPictures],
) -> str:
    """Return a hash of everything that the results and the report depend on."""
    reference = config.report.reference
    known: dict[str, Any] = {
        "version": VERSION,
        "run": config.run.name,
        "plan": asdict(plan),
        "eval": config.eval.model_dump(mode="json", exclude={"check"}),
        "report": config.report.model_dump(mode="json"),
        "reference": _sha256(reference.read_bytes()) if reference and reference.is_file() else None,
        "image_encoders": list(config.encoders.image_columns),
        "checkpoint": [checkpoint.sha256, checkpoint.metadata],
        "stores": {split: _describe(store) for split, store in stores.items()},
        "masked": {name: pictures.version() for name, pictures in masked.items()},
    }
    return _sha256(json.dumps(known, sort_keys=True, default=str).encode())


def _describe(store: FeatureStore) -> dict[str, Any]:
    columns = {}
    for name in store.columns():
        column = store.column(name)
        fingerprint = {k: v for k, v in column.fingerprint.items() if k not in NOT_COMPARED}
        columns[name] = [fingerprint, _sha256(column.status().tobytes())]
    return {"keys": store.keys_sha256, "classes": store.class_names, "columns": columns}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
