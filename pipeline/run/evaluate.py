"""Stage three as a run: stores and a checkpoint in, results.json and report.html out."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from align.checkpoint import Checkpoint, load_head
from evaluate.charts import Curve
from evaluate.config import EvalConfig
from evaluate.embedder import Embedder
from evaluate.masks import MaskedPictures, open_masked
from evaluate.measures import (
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
from evaluate.report import ColumnFacts, EncoderFacts, Report, SplitFacts, TrainingFacts, render
from evaluate.results import Result, read_results, write_items, write_results
from features.errors import ConfigError, EvaluationError
from features.status import Status
from features.storage.files import write
from features.storage.fingerprint import differences
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.progress import timed
from pipeline.run.config import RunConfig
from pipeline.run.device import prepare_device
from pipeline.run.folder import open_evaluated, run_folder, start_run
from pipeline.tables import rendered


@dataclass(frozen=True)
class Plan:
    """The splits of each measure."""

    retrieval: tuple[str, ...]
    zero_shot: tuple[str, ...]
    knn: tuple[str, ...]
    knn_reference: str
    compositional: tuple[str, ...]
    alignment: tuple[str, ...]
    segmentation: tuple[str, ...]
    """Not splits, but data sets with masks."""

    def uses_of(self, split: str) -> tuple[str, ...]:
        """Return, in words, what a split is used for."""
        uses = {
            "retrieval": self.retrieval,
            "zero-shot": self.zero_shot,
            "k-NN queries": self.knn,
            "k-NN reference": (self.knn_reference,) if self.knn else (),
            "compositional": self.compositional,
            "alignment": self.alignment,
        }
        return tuple(use for use, splits in uses.items() if split in splits)


def make_plan(
    config: EvalConfig, trained: Sequence[str], stores: Mapping[str, FeatureStore]
) -> Plan:
    """Take the splits that the settings name, or else all that have what a measure needs.

    Args:
        config: Settings.
        trained: The splits that the head was trained on; measured only if they are named. The first
            is the reference of k-NN if none is named.
        stores: All splits.

    Raises:
        EvaluationError: A split that is named lacks what the measure needs, or none has anything.
    """
    choice = _Choice(stores, [split for split in stores if split not in trained])
    plain = choice.without_groups()
    reference = config.knn_reference or trained[0]
    plan = Plan(
        retrieval=plain.of(config.retrieval, "retrieval", "captions", _has_captions),
        zero_shot=plain.of(
            config.zero_shot, "zero_shot", "labels with class names", _has_named_classes
        ),
        knn=_knn_splits(config, reference, plain),
        knn_reference=reference,
        compositional=choice.of(
            config.compositional, "compositional", "groups with captions", _has_groups
        ),
        alignment=plain.of(config.alignment, "alignment", "captions", _has_captions),
        segmentation=tuple(config.segmentation),
    )
    measured = (plan.retrieval, plan.zero_shot, plan.knn, plan.compositional, plan.segmentation)
    if not any(measured):
        others = f"only {', '.join(choice.others)}" if choice.others else "no split"
        raise EvaluationError(
            f"There is nothing to measure: beside {', '.join(map(repr, trained))}, on which the "
            f"head was trained, [data] has {others}. A split with captions, labels or groups was "
            f"expected. Add one of pictures kept from training, such as [data.test], or name "
            f"{trained[0]!r} in eval.retrieval."
        )
    return plan


@dataclass(frozen=True)
class _Choice:
    """Takes the splits that a setting names, or all that were not trained on and pass a test."""

    stores: Mapping[str, FeatureStore]
    others: list[str]

    def of(
        self, named: tuple[str, ...], setting: str, needs: str, test: Callable[[FeatureStore], bool]
    ) -> tuple[str, ...]:
        for split in named:
            if not test(self.stores[split]):
                raise EvaluationError(
                    f"eval.{setting} names {split!r}, but {self.stores[split].path} has no "
                    f"{needs}. A split that has them was expected. Take it out, or leave the "
                    f"setting empty."
                )
        return named or tuple(split for split in self.others if test(self.stores[split]))

    def without_groups(self) -> "_Choice":
        """Return the same choice, but of rows that were not made to be compared in groups."""
        plain = [split for split in self.others if self.stores[split].groups() is None]
        return _Choice(self.stores, plain)


def _knn_splits(config: EvalConfig, reference: str, choice: _Choice) -> tuple[str, ...]:
    voters = choice.stores[reference]
    if not is_labelled(voters):
        if not config.knn and config.knn_reference is None:
            return ()
        raise EvaluationError(
            f"The reference split of k-NN, {reference!r}, has no labels. A labelled split was "
            f"expected. Set eval.knn_reference, or leave eval.knn empty."
        )

    def can_be_voted_on(store: FeatureStore) -> bool:
        is_other = store.path != voters.path
        return is_other and is_labelled(store) and store.class_names == voters.class_names

    needs = f"labels of the same classes as {reference!r}, or is that split itself"
    return choice.of(config.knn, "knn", needs, can_be_voted_on)


def is_labelled(store: FeatureStore) -> bool:
    """Return whether any row of a store has a label."""
    labels = store.labels()
    return labels is not None and bool(np.any(labels >= 0))


def _has_named_classes(store: FeatureStore) -> bool:
    return is_labelled(store) and store.class_names is not None


def _has_groups(store: FeatureStore) -> bool:
    return store.groups() is not None and bool(store.fields)


def _has_captions(store: FeatureStore) -> bool:
    return bool(store.fields)


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
        stop.check()
    for split in plan.knn:
        with timed(f"k-NN on {split}"):
            score_knn(context, split, plan.knn_reference)
        stop.check()
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
        columns[name] = [column.fingerprint.deciding, _sha256(column.status().tobytes())]
    return {"keys": store.keys_sha256, "classes": store.class_names, "columns": columns}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
