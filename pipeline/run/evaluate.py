"""Stage three as a run: stores and a checkpoint in, results.json and report.html out."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from align.checkpoint import Checkpoint, facts_of, load_head
from evaluate.charts import Curve
from evaluate.context import Context
from evaluate.embedder import Embedder, looked_up_in
from evaluate.measures import MEASURES, measure_of
from evaluate.measures.measure import Inputs, Measure, Splits
from evaluate.report import (
    ColumnFacts,
    EncoderFacts,
    PublishedBeside,
    Report,
    Section,
    SplitFacts,
    TrainingFacts,
    render,
)
from evaluate.results import (
    STAMP,
    Findings,
    Result,
    read_results,
    read_stamp,
    sha256_of,
    write_items,
    write_results,
    write_stamp,
)
from features.device.memory import refusing_without_memory
from features.errors import ConfigError, EvaluationError, SailError, UnusableSplitError
from features.status import Status
from features.storage.files import delete, write
from features.storage.fingerprint import differences
from features.storage.reading import Expected, read_json, read_json_lines
from features.storage.synchronise import make_folder
from features.store import FeatureStore
from features.terminal import harmless
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine, timed
from pipeline.run.aligned import Aligned
from pipeline.run.config import RunConfig
from pipeline.run.device import prepare_device
from pipeline.run.folder import check_extracted, keep_settings, open_store, run_folder, stage_lock
from pipeline.tables import numbers, rendered, words

RECALLS = ("recall@1", "recall@5", "recall@10")


def make_report(
    config: RunConfig, context: Context, found: dict[str, Findings], metrics: Path
) -> Report:
    """Gather everything the report shows.

    Args:
        config: The run file.
        context: The run.
        found: What each measure found, by its name.
        metrics: The log of the training.
    """
    checkpoint = context.embedder.checkpoint
    splits = Splits(context.stores, context.trained)
    uses = [use for measure in MEASURES for use in measure.uses(config.eval, splits).items()]
    return Report(
        title=config.report.title or f"SAIL run {config.run.name}",
        run=config.run.name,
        written=f"Written on {date.today().isoformat()} by sail {metadata_version()}",
        checkpoint_sha256=checkpoint.sha256,
        checkpoint=f"{config.eval.checkpoint} head, of step {checkpoint.step:,}",
        encoders=tuple(_encoders(context)),
        splits=tuple(
            _split(
                split,
                store,
                tuple(["training"] * (split in context.trained))
                + tuple(use for use, names in uses if split in names),
            )
            for split, store in context.stores.items()
        ),
        training=training_facts(context, metrics),
        sections=tuple(
            Section(
                measure,
                tuple(found[measure.name].results),
                tuple(found[measure.name].exhibits),
            )
            for measure in MEASURES
        ),
        notes=tuple(dict.fromkeys(note for each in found.values() for note in each.notes)),
        published=_published(config, [each for part in found.values() for each in part.results]),
        reference=tuple(read_reference(config.report.reference)),
    )


def _published(config: RunConfig, results: list[Result]) -> PublishedBeside | None:
    given = config.report.published
    if given is None:
        return None
    return PublishedBeside.beside(results, given.by, given.percent, given.absent)


def training_facts(context: Context, metrics: Path) -> TrainingFacts:
    """Return the settings, sizes and curves of the training."""
    checkpoint = context.embedder.checkpoint
    lines = read_metrics(metrics)
    steps = [line for line in lines if {"loss", "epoch"} <= line.keys()]
    scored = [line for line in lines if all(f"heldout/{name}" in line for name in RECALLS)]
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
    """Read metrics.jsonl; a line that a kill cut off, or that is damaged, is left out."""
    if not path.is_file():
        return []
    lines, damaged = read_json_lines(path)
    whole = [line for line in lines if "step" in line and _is_numbers(line)]
    if damaged := damaged + len(lines) - len(whole):
        logger.warning("%s has %d lines that are damaged: its curves lack them", path, damaged)
    return whole


def _is_numbers(line: dict[str, Any]) -> bool:
    return all(isinstance(value, int | float) for value in line.values())


def read_reference(path: Path | None) -> list[dict[str, Any]]:
    """Read the rows of numbers recorded earlier.

    Raises:
        ConfigError: The file is missing, or is not a JSON list of objects.
    """
    if path is None:
        return []
    expected = Expected(
        "A JSON list of objects, one for each row of the table,",
        "Correct report.reference, or leave it out.",
        ConfigError,
    )
    rows: list[dict[str, Any]] = read_json(path, list[dict[str, Any]], expected)
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
        EncoderFacts(kind, each["name"], True, int(each["dim"]), _full(facts_of(each)))
        for kind, each in aligned
    ]
    for name in context.image_columns:
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


def _split(name: str, store: FeatureStore, uses: tuple[str, ...]) -> SplitFacts:
    source = store.source
    path = source.get("path", "")
    place = ", ".join(map(str, path)) if isinstance(path, list) else str(path)
    return SplitFacts(
        name=name,
        used_for=uses,
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
            "{:.2f} and {:.2f}".format(*model.scale_and_bias),
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
WRITTEN = ("items.npz", "results.json", "report.html")
VERSION = 9  # raised when the same inputs give other results or another report


def evaluate_run(config: RunConfig, stop: StopRequest) -> Path:
    """Take every measure that the splits of a recipe allow; return the path of results.json.

    When nothing has changed since the last time, nothing is done.

    Raises:
        CheckpointError: There is no trained head.
        EvaluationError: A measure that is asked for cannot be taken.
        LockedError: Another process evaluates this run.
        Stopped: A signal came; what an earlier evaluation wrote is as it was.
    """
    with stage_lock(config, "eval"), _no_prompts_if_refused(config.run.dir / "eval"):
        return _evaluate(config, stop)


@contextmanager
def _no_prompts_if_refused(folder: Path) -> Iterator[None]:
    """Remove the prompts that an evaluation encoded before it was refused."""
    before = set(folder.glob("prompts-*.npy"))
    try:
        yield
    except SailError:
        for path in set(folder.glob("prompts-*.npy")) - before:
            path.unlink(missing_ok=True)
        raise


def _evaluate(config: RunConfig, stop: StopRequest) -> Path:
    folder = run_folder(config)
    checkpoint_path = folder.align / config.eval.checkpoint
    if not checkpoint_path.exists():
        check_extracted(config)
    checkpoint = Checkpoint.open(checkpoint_path)
    if "imported" not in checkpoint.run:
        _say_other_head(checkpoint, config)
    stores = {split: open_store(config, folder, split) for split in config.data}
    inputs = {
        measure.name: measure.inputs(config.eval, config.extract.max_pixels) for measure in MEASURES
    }
    work = _plan(config, Splits(stores, config.trained_splits))
    results, report = folder.eval / "results.json", folder.eval / "report.html"
    digest = _digest(config, work, checkpoint, stores, inputs)
    if _is_up_to_date(folder.eval, digest):
        logger.info("%s is up to date", results)
        return results
    make_folder(folder.eval)
    context = _context(config, checkpoint_path, stores, inputs, stop)
    if context.embedder.checkpoint.path != checkpoint.path:  # training has put another one there
        digest = _digest(config, work, context.embedder.checkpoint, stores, inputs)
    found = {measure.name: _taken(measure, work[measure.name], context) for measure in MEASURES}
    if not any(found[measure.name].results for measure in MEASURES if measure.is_of_head):
        notes = dict.fromkeys(note for part in found.values() for note in part.notes)
        raise EvaluationError(f"Nothing could be measured. {' '.join(notes)} Correct [data].")
    page = render(make_report(config, context, found, folder.align / "metrics.jsonl"))
    delete(folder.eval / STAMP)  # from here on the files may not belong together
    items = {name: each for part in found.values() for name, each in part.items.items()}
    write_items(folder.eval / "items.npz", items)
    write_results(
        results,
        run=config.run.name,
        checkpoint_sha256=context.embedder.checkpoint.sha256,
        results=[result for part in found.values() for result in part.results],
    )
    write(report, page.encode())
    keep_settings(config, "eval")
    write_stamp(folder.eval, digest, WRITTEN)
    return results


def _is_up_to_date(folder: Path, digest: str) -> bool:
    """Return whether neither inputs nor what was written has changed since the last time."""
    known = read_stamp(folder)
    if known.pop("inputs", None) != digest or set(known) != set(WRITTEN):
        return False
    changed = [name for name, written in known.items() if sha256_of(folder / name) != written]
    if changed:
        logger.warning(
            "%s of %s is not as it was written: everything is measured again", changed[0], folder
        )
    return not changed


def _context(
    config: RunConfig,
    checkpoint_path: Path,
    stores: dict[str, FeatureStore],
    inputs: dict[str, Mapping[str, Inputs]],
    stop: StopRequest,
) -> Context:
    folder, device = run_folder(config), prepare_device(config.run)
    model, checkpoint = load_head(checkpoint_path, device)
    aligned = Aligned.of_run(config, checkpoint, model, device)

    return Context(
        settings=config.eval,
        trained=config.trained_splits,
        stores=stores,
        embedder=Embedder(model, checkpoint, device),
        image_columns=config.encoders.image_columns,
        text_encoders=config.encoders.text_columns,
        image_encoder=lambda: (aligned.image_encoder, aligned.image_column),
        index=folder.index,
        max_pixels=config.extract.max_pixels,
        prompts=folder.eval,
        inputs=inputs,
        check_stop=stop.check,
        progress=ProgressLine,
    )


def _plan(config: RunConfig, splits: Splits) -> dict[str, tuple[str, ...]]:
    """Return, by the name of each measure, what it is taken on.

    Raises:
        EvaluationError: A split that is named lacks what the measure needs, or none has anything.
    """
    work = {measure.name: measure.splits(config.eval, splits) for measure in MEASURES}
    if not any(work[measure.name] for measure in MEASURES if measure.is_of_head):
        trained = splits.trained
        others = ", ".join(split for split in splits.stores if split not in trained)
        beside = (
            f"beside {', '.join(map(repr, trained))}, on which the head was trained, "
            if trained
            else ""
        )
        measured = f", or name {trained[0]!r} in eval.retrieval" if trained else ""
        raise EvaluationError(
            f"There is nothing to measure: {beside}[data] has {'only ' * bool(others)}"
            f"{others or 'no split'}. A split with captions, labels or groups was expected. Add "
            f"one of pictures kept from training, such as [data.test]{measured}."
        )
    return work


ELSEWHERE = "Free that device, or evaluate on another, such as run.device = cpu."


def _taken(measure: Measure, splits: tuple[str, ...], context: Context) -> Findings:
    """Return what a measure found on all its splits; one without a usable row is named."""
    every = Findings()
    for split in splits:
        try:
            what, device = f"{measure.title} on {split}", context.embedder.device
            with timed(what), refusing_without_memory(EvaluationError, what, device, ELSEWHERE):
                found = measure.run(context, split)
        except UnusableSplitError as error:
            logger.warning("%s on %s is left out: %s", measure.title, split, error)
            every.notes.append(f"{measure.title} on {split} is left out: {error}")
            continue
        every.results += found.results
        every.items |= found.items
        every.exhibits += found.exhibits
        every.notes += found.notes
        context.check_stop()
    return every


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
        table.add_row(Text(harmless(task), "bold"))
        width = max(len(result.dataset) for result in results)
        for result in results:
            name = f"  {result.dataset:<{width}}  {_metric(result)}"
            table.add_row(Text(harmless(name)), *_numbers(result))
    return rendered(table)


def published_table(path: Path, config: RunConfig) -> str:
    """Return what `sail eval --suite` prints beside the numbers: those that were published."""
    found = _published(config, read_results(path))
    if found is None:
        return ""
    table = Table(*words("published by " + found.by), *numbers("published", "here", "difference"))
    for name, value, own in found.rows:
        here = None if own is None else 100 * own.value
        shown = ("–", "–") if here is None else (f"{here:.2f}", f"{here - value:+.2f}")
        table.add_row(Text(harmless(name)), f"{value:.2f}", *shown)
    absent = [f"not found: {name} ({place})" for name, place in found.absent.items()]
    return "\n".join([rendered(table), *absent])


def _metric(result: Result) -> str:
    measure = measure_of(result)
    variant = measure.variant(result) if measure else ""
    return f"{result.metric}, {variant}" if variant else result.metric


def _numbers(result: Result) -> tuple[str, str, str, str]:
    return (
        f"{100 * result.value:z.1f}",
        "–".join(f"{100 * end:z.1f}" for end in result.ci95 or ()),
        "" if result.chance is None else f"{100 * result.chance:z.1f}",
        f"{result.n:,}",
    )


def _say_other_head(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Say in the log where a trained head is not the one that the settings describe."""
    settings = config.align.head.model_dump(mode="json", exclude_unset=True)
    trained = {name: checkpoint.run["align"]["head"].get(name) for name in settings}
    for name, found, expected in differences(trained, settings):
        logger.warning(
            "align.head.%s is %r, but %s was trained with %r, and is measured as it was trained",
            name,
            expected,
            checkpoint.path,
            found,
        )


def _digest(
    config: RunConfig,
    work: dict[str, tuple[str, ...]],
    checkpoint: Checkpoint,
    stores: dict[str, FeatureStore],
    inputs: dict[str, Mapping[str, Inputs]],
) -> str:
    """Return a hash of everything that the results and the report depend on."""
    reference = config.report.reference
    known: dict[str, Any] = {
        "version": VERSION,
        "run": config.run.name,
        "work": work,
        "eval": config.eval.model_dump(mode="json", exclude={"check"}),
        "report": config.report.model_dump(mode="json"),
        "reference": _sha256(reference.read_bytes()) if reference and reference.is_file() else None,
        "image_encoders": list(config.encoders.image_columns),
        "checkpoint": [checkpoint.sha256, checkpoint.metadata],
        "stores": {split: _describe(store) for split, store in stores.items()},
        "inputs": {
            measure: {name: each.version() for name, each in opened.items()}
            for measure, opened in inputs.items()
        },
    }
    if tables := looked_up_in(config.encoders.text):
        known["looked_up"] = tables
    return _sha256(json.dumps(known, sort_keys=True, default=str).encode())


def _describe(store: FeatureStore) -> dict[str, Any]:
    columns = {}
    for name in store.columns():
        column = store.column(name)
        columns[name] = [column.fingerprint.deciding, _sha256(column.status().tobytes())]
    return {"keys": store.keys_sha256, "classes": store.class_names, "columns": columns}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
