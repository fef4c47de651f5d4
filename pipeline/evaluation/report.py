"""The report of a run: what was run, gathered from its stores, checkpoint and metrics."""

import json
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.charts import Curve
from evaluate.report import (
    ColumnFacts,
    EncoderFacts,
    Report,
    SplitFacts,
    TrainingFacts,
)
from features.errors import ConfigError
from features.status import Status
from features.store import FeatureStore
from pipeline.config import RunConfig
from pipeline.evaluation.plan import Plan
from pipeline.measures import Context

RECALLS = ("recall@1", "recall@5", "recall@10")


def make_report(context: Context, plan: Plan, metrics: Path) -> Report:
    """Gather everything the report shows."""
    config, checkpoint = context.config, context.embedder.checkpoint
    findings = context.findings
    kind = config.eval.checkpoint
    return Report(
        title=config.report.title or f"SAIL run {config.run.name}",
        run=config.run.name,
        written=f"Written on {date.today().isoformat()} by sail {metadata_version()}",
        checkpoint_sha256=checkpoint.sha256,
        checkpoint=f"{kind} head, of step {checkpoint.step:,}",
        encoders=tuple(_encoders(context)),
        splits=tuple(_split(name, store, plan, config) for name, store in context.stores.items()),
        training=training_facts(context, metrics),
        results=tuple(findings.results),
        panels=tuple(findings.panels),
        groups=tuple(findings.groups),
        confusions=tuple(findings.confusions),
        segmented=tuple(findings.segmented),
        notes=tuple(findings.notes),
        reference=tuple(read_reference(config.report.reference)),
    )


def training_facts(context: Context, metrics: Path) -> TrainingFacts:
    """Return the settings, sizes and curves of the training."""
    checkpoint = context.embedder.checkpoint
    lines = read_metrics(metrics)
    steps = [line for line in lines if "loss" in line]
    scored = [line for line in lines if f"heldout/{RECALLS[0]}" in line]
    x = [float(line["step"]) for line in scored]
    return TrainingFacts(
        facts=tuple(_facts(context, steps)),
        loss=Curve(
            _loss_name(checkpoint.run["align"]["loss"]),
            [float(line["step"]) for line in steps],
            [float(line["loss"]) for line in steps],
        ),
        recalls=tuple(
            Curve(name, x, [float(line[f"heldout/{name}"]) for line in scored])
            for name in RECALLS
            if scored
        ),
        best_step=int(checkpoint.metadata.get("best_step") or checkpoint.step),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a line that a kill cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def read_reference(path: Path | None) -> list[dict[str, Any]]:
    """Read the rows of numbers recorded earlier.

    Raises:
        ConfigError: The file is missing, or is not a JSON list of objects.
    """
    if path is None:
        return []
    expected = (
        "A JSON list of objects, one for each row of the table, was expected. Correct "
        "report.reference, or leave it out."
    )
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. {expected}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} is {type(rows).__name__}, not rows of a table. {expected}")
    return rows


def metadata_version() -> str:
    """Return the version of the installed program."""
    try:
        return metadata.version("sail")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _encoders(context: Context) -> list[EncoderFacts]:
    """Return the aligned encoders, then the others whose columns were measured beside them."""
    checkpoint = context.embedder.checkpoint
    aligned = [("image", checkpoint.image), ("text", checkpoint.text)]
    facts = [
        EncoderFacts(kind, each["name"], True, int(each["dim"]), _full(each["fingerprint"]))
        for kind, each in aligned
    ]
    for name in context.config.encoders.image_columns:
        columns = [
            store.column(f"image/{name}")
            for store in context.stores.values()
            if f"image/{name}" in store.columns()
        ]
        if name != context.embedder.image and columns:
            found = columns[0]
            facts.append(EncoderFacts("image", name, False, found.dim, _full(found.fingerprint)))
    return facts


def _full(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    keys = "model revision pooling layer mode supervision licence weights_sha256"
    return {key: fingerprint.get(key) for key in keys.split()}


def _split(name: str, store: FeatureStore, plan: Plan, config: RunConfig) -> SplitFacts:
    training = ("training",) if name in config.trained_splits else ()
    source = store.source
    path = source.get("path", "")
    place = ", ".join(map(str, path)) if isinstance(path, list) else str(path)
    return SplitFacts(
        name=name,
        used_for=training + plan.uses_of(name),
        rows=store.rows,
        fields=store.fields,
        classes=len(store.class_names or ()),
        source=f"{source.get('kind', '?')}: …/{'/'.join(Path(place).parts[-3:])}",
        columns=tuple(_column(store, column) for column in store.columns()),
    )


def _column(store: FeatureStore, name: str) -> ColumnFacts:
    codes, counts = np.unique(store.column(name).status(), return_counts=True)
    by_reason = {Status(int(code)): int(count) for code, count in zip(codes, counts, strict=True)}
    ok = by_reason.pop(Status.OK, 0)
    return ColumnFacts(name, ok, {status.label: count for status, count in by_reason.items()})


def _facts(context: Context, steps: list[dict[str, Any]]) -> list[tuple[str, str]]:
    checkpoint, model = context.embedder.checkpoint, context.embedder.model
    align = checkpoint.run["align"]
    head, loss, optimizer = align["head"], align["loss"], align["optimizer"]
    weights = sum(parameter.numel() for parameter in model.parameters())
    shape = f"{head['depth']} gated layers" if head["kind"] == "glu" else f"kind “{head['kind']}”"
    facts = [
        ("head", f"{shape} per modality, to {head['dim']} numbers; {weights:,} weights in all"),
        (
            "loss",
            f"{loss['kind']}, positives “{loss['positives']}”, captions "
            f"{', '.join(checkpoint.run['fields'])}",
        ),
        (
            "optimizer",
            f"{optimizer['kind']}, learning rate {optimizer['learning_rate']:g}, batches of "
            f"{align['batch_size']:,} images",
        ),
        (
            "learned scale and bias",
            f"{model.log_scale.exp().item():.2f} and {model.bias.item():.2f}",
        ),
        ("seed", str(checkpoint.run["seed"])),
    ]
    if steps:
        last = steps[-1]
        length = f"{last['step']:,} steps, {last['epoch']:g} passes over the training rows"
        facts.insert(3, ("length", length))
    return facts


def _loss_name(loss: dict[str, Any]) -> str:
    if loss["kind"] != "sigmoid":
        return "loss (nats)"
    return f"loss (nats per {loss['normalise']})"
