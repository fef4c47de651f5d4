"""Alignment probing: a short linear alignment of every pair of encoders, scored on the same rows.

run_dir/study/probes/IMAGE--TEXT/align/      the training, which resumes by itself
run_dir/study/probes/IMAGE--TEXT/probe.json  its time, and what it was scored on
run_dir/study/probes/IMAGE--TEXT/items.npz   what every image scored
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

from align.checkpoint import load_head
from align.columns import Columns, select_rows
from align.heldout import Relevance, retrieval_ranks
from evaluate.embedder import Embedder, complete_column
from evaluate.linear_probe import fit_linear_probe
from evaluate.measures.alignment import AlignmentName, pair_measure
from evaluate.measures.knn import KnnSettings, find_neighbours
from evaluate.measures.retrieval import hits_per_image
from evaluate.nearest import vote
from evaluate.results import Items, read_items, write_items
from evaluate.statistics import Prepare, calibrate, half_sample_interval, interval_of
from features.errors import ConfigError, EvaluationError
from features.status import Status
from features.storage.column import Column
from features.storage.files import write_json
from features.storage.reading import Expected, read_json
from features.store import FeatureStore
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import RunConfig, vary_config
from pipeline.run.device import prepare_device
from pipeline.run.folder import open_store, run_folder

LEAST_SCORED = 10
logger = logging.getLogger(__name__)
ROWS = 1000
"""Pairs on which encoders are compared: spread evenly over the training split."""
K = 10
PERMUTATIONS, HALVES, SEED = 20, 20, 0
HELD_OUT = 5
"""Every so many rows of the reference choose the regularisation of the linear probe."""
PAIR_MEASURES: dict[str, AlignmentName] = {
    "cka": "cka_debiased",
    "mutual_knn": "mutual_knn",
    "cknna": "cknna",
    "svcca": "svcca",
}
RECALL_AT = 10
WAYS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class StudyRows:
    """Rows of one store, and their captions that can be used."""

    store: FeatureStore
    fields: tuple[str, ...]
    rows: Int64[np.ndarray, "rows"]
    """In order."""
    text_ok: Bool[np.ndarray, "rows fields"]
    """Usable by every text encoder."""

    @property
    def sha256(self) -> str:
        """Of what decides which items are scored."""
        digest = hashlib.sha256(f"{self.store.keys_sha256} {self.fields}".encode())
        digest.update(self.rows.astype("<i8").tobytes())
        digest.update(self.text_ok.tobytes())
        return digest.hexdigest()


def scored_rows(config: RunConfig, split: str | None) -> StudyRows:
    """Return the rows that alignment is scored on: of a split, or those that training holds out.

    Raises:
        ConfigError: Nothing is held out, or several splits are mixed.
        EvaluationError: Too few rows are usable by every encoder.
    """
    config.check_trains()
    if config.align.mix:
        raise ConfigError(
            "align.mix names several splits. Set align.split to the one on which all pairs train."
        )
    if split is None and config.align.holdout == 0:
        raise ConfigError(
            "align.holdout = 0 leaves no rows to score the pairs on. Raise it, or name a split "
            "with --on."
        )
    if split is not None and (split not in config.data or split == config.align.split):
        raise ConfigError(
            f"--on {split} is no split to score on. Name one of [data] that is not trained on: "
            f"{[name for name in config.data if name != config.align.split]}."
        )
    found = usable_rows(config, split or config.align.split)
    if split is None:
        image, text = config.encoders.image_columns[0], next(iter(config.encoders.text_columns))
        selection = select_rows(
            Columns.open(found.store, config.align, image, text),
            holdout=config.align.holdout,
            holdout_rows=config.align.holdout_rows,
        )
        kept = np.isin(found.rows, selection.heldout)
        found = StudyRows(found.store, found.fields, found.rows[kept], found.text_ok[kept])
    if len(found.rows) < LEAST_SCORED:
        raise EvaluationError(
            f"{found.store.path} has {len(found.rows)} rows that every encoder has to score on, "
            f"fewer than {LEAST_SCORED}. Raise align.holdout, or name a split with --on."
        )
    return found


def usable_rows(config: RunConfig, split: str) -> StudyRows:
    """Return the rows of a split whose image, and at least one caption, every encoder has.

    Raises:
        ConfigError: The recipe has no image or no text encoder.
        EvaluationError: A column is not complete.
    """
    encoders = config.encoders
    if not encoders.image_columns or not encoders.text_columns:
        raise ConfigError(
            "The recipe has no image or no text encoder. Add candidates of both kinds under "
            "[encoders], and run `sail extract`."
        )
    store = open_store(config, run_folder(config), split)
    fields = tuple(config.align.fields or store.fields)
    if not fields:
        raise EvaluationError(f"{store.path} has no captions. Name another split.")
    ok = np.ones(store.rows, dtype=bool)
    for image in encoders.image_columns:
        ok &= complete_column(store, f"image/{image}").status() == Status.OK
    text_ok = np.ones((store.rows, len(fields)), dtype=bool)
    for text in encoders.text_columns:
        for place, field in enumerate(fields):
            column = complete_column(store, f"text/{text}/{field}")
            text_ok[:, place] &= column.status() == Status.OK
    rows = np.flatnonzero(ok & text_ok.any(axis=1))
    return StudyRows(store, fields, rows, text_ok[rows])


EXPECTED = Expected("What an earlier call measured", "Delete it: it is measured again.")


@dataclass(frozen=True)
class Kept:
    """What was measured before, in a file that is written after each measure."""

    path: Path
    known: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Kept":
        """Read the file; nothing is known where there is none."""
        known: dict[str, Any] = {}
        if path.exists():
            known = read_json(path, dict[str, dict[str, Any]], EXPECTED)
        return cls(path, known)

    def get(self, inputs: list[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is known of these inputs, or measure it, with its seconds."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        if key not in self.known:
            begun = time.perf_counter()
            found = measure()
            self.known[key] = found | {"seconds": round(time.perf_counter() - begun, 3)}
            write_json(self.path, self.known)
        value: dict[str, Any] = self.known[key]
        return value


def measure_images(
    config: RunConfig, splits: tuple[str, str], kept: Kept, stop: StopRequest
) -> dict[str, dict[str, Any]]:
    """Return k-NN accuracy and that of a linear probe for every image column.

    Args:
        config: The recipe.
        splits: Labelled split whose rows are classified, and that whose rows are learned from.
        kept: What is known.
        stop: Whether to stop.
    """
    names = {"knn_temperature", "knn_k", "knn_search", "bootstrap", "seed"}
    votes = config.eval.model_dump(mode="json", include=names)
    probed = [HELD_OUT, SEED, votes["bootstrap"], votes["seed"]]
    measures = {"knn_top1": (_knn, [votes]), "linear_probe_top1": (_linear_probe, probed)}
    found: dict[str, dict[str, Any]] = {}
    for name in config.encoders.image_columns:
        query, reference = (_labelled(config, split, name) for split in splits)
        rows, found[name] = [_described(query), _described(reference)], {}
        for measure, (take, settings) in measures.items():
            _go_on(stop, f"{measure} of {name}")
            inputs = [measure, *rows, *settings]
            found[name][measure] = kept.get(inputs, partial(take, config, query, reference))
    return found


def measure_pairs(
    config: RunConfig, kept: Kept, stop: StopRequest
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the measures of every pair: value, interval, null, and the value calibrated by it."""
    rows = _spread(usable_rows(config, config.align.split))
    for image, text in product(config.encoders.image_columns, config.encoders.text_columns):
        names = (f"image/{image}", f"text/{text}/{rows.fields[0]}")
        columns = [rows.store.column(name) for name in names]
        inputs = [rows.sha256, *map(_fingerprint, columns), K, PERMUTATIONS]
        measures = {}
        for name, measure in PAIR_MEASURES.items():
            _go_on(stop, f"{name} of {image} and {text}")
            on = (pair_measure(measure, K)[0], columns, rows.rows)
            found = kept.get([name, *inputs], partial(_calibrated, *on))
            # Apart, so that the seconds are those of the measure.
            of_interval = [f"interval of {name}", *inputs, HALVES]
            doubt = kept.get(of_interval, partial(_interval, *on, found["value"]))
            measures[name] = found | {"ci95": doubt["ci95"]}
        yield image, text, measures


def _calibrated(
    prepare: Prepare, columns: Sequence[Column], rows: Int64[np.ndarray, "rows"]
) -> dict[str, Any]:
    first, second = (_read(column, rows) for column in columns)
    found = calibrate(prepare, (first, second), permutations=PERMUTATIONS, subsamples=0, seed=SEED)
    kept = ("value", "null_mean", "calibrated", "p_value")
    return {name: getattr(found, name) for name in kept} | {"n": len(rows)}


def _interval(
    prepare: Prepare, columns: Sequence[Column], rows: Int64[np.ndarray, "rows"], value: float
) -> dict[str, Any]:
    """Return the interval of a value, None where halves of the rows have no k neighbours."""
    first, second = (_read(column, rows) for column in columns)
    halves = HALVES if len(rows) // 2 > K else 0
    interval = half_sample_interval(prepare, (first, second), value, subsamples=halves, seed=SEED)
    return {"ci95": interval}


@dataclass(frozen=True)
class _Labelled:
    """The rows of an image column that have a label."""

    column: Column
    rows: Int64[np.ndarray, "rows"]
    labels: Int64[np.ndarray, "rows"]


def _labelled(config: RunConfig, split: str, name: str) -> _Labelled:
    store = open_store(config, run_folder(config), split)
    column = complete_column(store, f"image/{name}")
    labels = store.labels()
    rows = column.ok_rows()
    known = np.full(store.rows, -1) if labels is None else labels.astype(np.int64)
    rows = rows[known[rows] >= 0]
    return _Labelled(column, rows, known[rows])


def _knn(config: RunConfig, query: _Labelled, reference: _Labelled) -> dict[str, Any]:
    """Return the best accuracy over the k of the settings, as DINO reports it."""
    settings = config.eval.of(KnnSettings)
    ks = [k for k in settings.knn_k if k <= len(reference.rows)] or [len(reference.rows)]
    neighbours, about = find_neighbours(
        settings,
        _read(query.column, query.rows),
        lambda: reference.column.blocks(reference.rows),
        len(reference.rows),
        max(ks),
    )
    num_classes = int(max(query.labels.max(), reference.labels.max())) + 1
    temperature = settings.knn_temperature
    voted = partial(vote, neighbours, temperature=temperature, num_classes=num_classes)
    right = {k: query.labels == voted(reference.labels, k=k) for k in ks}
    best = max(right, key=lambda k: float(right[k].mean()))
    return _accuracy(config, right[best]) | {"k": best} | about


def _linear_probe(config: RunConfig, query: _Labelled, reference: _Labelled) -> dict[str, Any]:
    order = np.random.default_rng(SEED).permutation(len(reference.rows))
    probe = fit_linear_probe(
        _read(reference.column, reference.rows), reference.labels, order % HELD_OUT == 0
    )
    right = probe.predict(_read(query.column, query.rows)) == query.labels
    chosen = {"regularisation": probe.regularisation, "converged": probe.converged}
    return _accuracy(config, right) | chosen


def _accuracy(config: RunConfig, right: Bool[np.ndarray, "queries"]) -> dict[str, Any]:
    resamples, seed = config.eval.bootstrap, config.eval.seed
    interval = interval_of(Items(right.astype(np.int64)), resamples=resamples, seed=seed)
    return {"value": float(right.mean()), "ci95": interval, "n": len(right)}


def _spread(rows: StudyRows) -> StudyRows:
    """Return at most `ROWS` rows with a first caption, evenly from all."""
    usable = np.flatnonzero(rows.text_ok[:, 0])
    chosen = usable[np.linspace(0, len(usable) - 1, min(ROWS, len(usable))).astype(np.int64)]
    return StudyRows(rows.store, rows.fields, rows.rows[chosen], rows.text_ok[chosen])


def _read(column: Column, rows: Int64[np.ndarray, "rows"]) -> Float[np.ndarray, "rows dim"]:
    return column.rows_at(rows).astype(np.float32)


def _described(labelled: _Labelled) -> list[Any]:
    digest = hashlib.sha256(labelled.rows.tobytes() + labelled.labels.tobytes()).hexdigest()
    return [_fingerprint(labelled.column), digest]


def _fingerprint(column: Column) -> dict[str, Any]:
    return column.fingerprint.deciding | {"column": str(column.path)}


def _go_on(stop: StopRequest, what: str) -> None:
    stop.check()
    logger.debug("%s", what)


@dataclass(frozen=True)
class Probe:
    """How well a pair of encoders aligns."""

    image: str
    text: str
    seconds: float
    """Of the training, as far as the last call did it."""
    items: dict[str, Items]
    """Of both ways of recall@10, by image."""

    def recall(
        self, drawn: Int64[np.ndarray, "resamples images"] | None = None
    ) -> Float[np.ndarray, "resamples"]:
        """Return the mean of both recalls@10 over the images, each counted as often as drawn."""
        if drawn is None:
            drawn = np.ones((1, len(self.items[WAYS[0]].hits)), dtype=np.int64)
        both = [_ratio(drawn, self.items[way]) for way in WAYS]
        mean: np.ndarray = np.mean(both, axis=0)
        return mean


def probe_pairs(
    config: RunConfig, on: str | None, stop: StopRequest
) -> tuple[StudyRows, list[Probe]]:
    """Train and score every pair of an image column and a text encoder that was not before.

    The heads are LayerNorm and one matrix, and the loss the sigmoid; all else is as [align] says.

    Args:
        config: The recipe, whose features are there.
        on: Split to score on; the held-out rows of the training split if not given.
        stop: Whether to stop.

    Raises:
        ConfigError: There is nothing to train or score on.
        Stopped: A signal came; the same call goes on from here.
    """
    rows = scored_rows(config, on)
    pairs = list(product(config.encoders.image_columns, config.encoders.text_columns))
    probes = []
    for number, (image, text) in enumerate(pairs, 1):
        stop.check()
        logger.info("probe %d of %d: %s with %s", number, len(pairs), image, text)
        folder = config.run.dir / "study" / "probes" / f"{image}--{text}"
        overrides = [f"align.image='{image}'", f"align.text='{text}'"]
        overrides += ["align.head.kind=linear", "align.loss.kind=sigmoid"]
        probes.append(_probe(vary_config(config, folder, overrides), rows, stop))
    return rows, probes


def _probe(config: RunConfig, rows: StudyRows, stop: StopRequest) -> Probe:
    begun = time.perf_counter()
    best = align_run(config, stop)
    if best is None:
        raise Stopped
    seconds = time.perf_counter() - begun
    image, text = config.aligned_encoder("image"), config.aligned_encoder("text")
    model, checkpoint = load_head(best, prepare_device(config.run))
    note, kept = config.run.dir / "probe.json", config.run.dir / "items.npz"
    known: dict[str, Any] = read_json(note, dict[str, Any], EXPECTED) if note.exists() else {}
    of = {"checkpoint_sha256": checkpoint.sha256, "rows_sha256": rows.sha256}
    if known.get("checkpoint_sha256") == checkpoint.sha256:
        seconds = known["seconds"]  # this call found the training done
    if {name: known.get(name) for name in of} != of or not kept.is_file():
        embedder = Embedder(model, checkpoint, prepare_device(config.run))
        write_items(kept, _scored(embedder, rows))
        write_json(note, of | {"seconds": seconds})
    return Probe(image, text, seconds, read_items(kept))


def _scored(embedder: Embedder, rows: StudyRows) -> dict[str, Items]:
    """Search both ways among the rows; of every image, what it and its captions found."""
    store, images = rows.store, len(rows.rows)
    vectors: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for place, field in enumerate(rows.fields):
        usable = np.flatnonzero(rows.text_ok[:, place])
        owners.append(usable)
        vectors += embedder.blocks(embedder.text_column(store, field), rows.rows[usable])
    owner = np.concatenate(owners)
    image = np.concatenate(list(embedder.blocks(embedder.image_column(store), rows.rows)))
    ranks = retrieval_ranks(
        torch.from_numpy(image),
        torch.from_numpy(np.concatenate(vectors)),
        Relevance(images, torch.from_numpy(owner)),
    )
    hits, counts = hits_per_image(ranks.by_text.numpy(), owner, images=images, k=RECALL_AT)
    of_images = Items((ranks.by_image.numpy() < RECALL_AT).astype(np.int64))
    return {WAYS[0]: of_images, WAYS[1]: Items(hits, counts)}


def _ratio(
    drawn: Int64[np.ndarray, "resamples images"], items: Items
) -> Float[np.ndarray, "resamples"]:
    ratio: np.ndarray = (drawn @ items.hits) / np.maximum(drawn @ items.out_of, 1)
    return ratio


def draws(images: int, *, resamples: int, seed: int) -> Int64[np.ndarray, "resamples images"]:
    """Return how often each image comes when as many are drawn anew, with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=resamples)


def probe_folder(config: RunConfig) -> Path:
    """Return where a study writes."""
    return config.run.dir / "study"
