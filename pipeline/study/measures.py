"""What is measured of frozen encoders before anything is trained, each with its time."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from evaluate.bootstrap import ratio_interval
from evaluate.cka import LinearCka
from evaluate.knn import vote
from evaluate.linear_probe import fit_linear_probe
from evaluate.mutual_knn import Cknna, MutualKnn, nearest_others
from evaluate.permutation import Prepare, calibrate, half_sample_interval
from evaluate.svcca import Svcca
from features.column import Column
from features.storage.files import write
from features.store import NOT_COMPARED
from pipeline.config import RunConfig
from pipeline.embedding.rows import complete_column, feature_blocks, ok_rows
from pipeline.interrupt import Stopped, StopRequest
from pipeline.measures.knn import find_neighbours
from pipeline.run import run_folder
from pipeline.stores import open_evaluated
from pipeline.study.rows import StudyRows, usable_rows

logger = logging.getLogger(__name__)
ROWS = 1000
"""Pairs on which encoders are compared: spread evenly over the training split."""
K = 10
PERMUTATIONS, HALVES, SEED = 20, 20, 0
HELD_OUT = 5
"""Every so many rows of the reference choose the regularisation of the linear probe."""
Features = Float[np.ndarray, "rows dim"]
PAIR_MEASURES: dict[str, Prepare] = {
    "cka": lambda first, second: LinearCka(first, second, debiased=True),
    "mutual_knn": lambda first, second: MutualKnn(
        nearest_others(first, K), nearest_others(second, K)
    ),
    "cknna": lambda first, second: Cknna(nearest_others(first, K), nearest_others(second, K)),
    "svcca": Svcca,
}


@dataclass(frozen=True)
class Kept:
    """What was measured before, in a file that is written after each measure."""

    path: Path
    known: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Kept":
        """Read the file; nothing is known where there is none."""
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(path, known)

    def get(self, inputs: list[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is known of these inputs, or measure it, with its seconds."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        if key not in self.known:
            begun = time.perf_counter()
            found = measure()
            self.known[key] = found | {"seconds": round(time.perf_counter() - begun, 3)}
            write(self.path, (json.dumps(self.known, indent=1) + "\n").encode())
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
    found: dict[str, dict[str, Any]] = {}
    for name in config.encoders.image_columns:
        query, reference = (_labelled(config, split, name) for split in splits)
        rows = [_described(query), _described(reference)]
        votes = config.eval.model_dump(
            mode="json", include={"knn_temperature", "knn_k", "knn_search", "bootstrap", "seed"}
        )
        found[name] = {}
        for measure, settings, take in (
            ("knn_top1", [votes], _knn),
            (
                "linear_probe_top1",
                [HELD_OUT, SEED, votes["bootstrap"], votes["seed"]],
                _linear_probe,
            ),
        ):
            _go_on(stop, f"{measure} of {name}")
            found[name][measure] = kept.get(
                [measure, *rows, *settings], partial(take, config, query, reference)
            )
    return found


def measure_pairs(
    config: RunConfig, kept: Kept, stop: StopRequest
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the measures of every pair: value, interval, null, and the value calibrated by it."""
    rows = _spread(usable_rows(config, config.align.split))
    for image in config.encoders.image_columns:
        column = rows.store.column(f"image/{image}")
        for text in config.encoders.text:
            texts = rows.store.column(f"text/{text}/{rows.fields[0]}")
            inputs = [rows.sha256, _fingerprint(column), _fingerprint(texts), K, PERMUTATIONS]
            measures = {}
            for name, prepare in PAIR_MEASURES.items():
                _go_on(stop, f"{name} of {image} and {text}")
                read = partial(_read_both, column, texts, rows.rows)
                found = kept.get([name, *inputs], partial(_calibrated, prepare, read))
                # Apart, so that the seconds are those of the measure.
                doubt = kept.get(
                    [f"interval of {name}", *inputs, HALVES],
                    partial(_interval, prepare, read, found["value"]),
                )
                measures[name] = found | {"ci95": doubt["ci95"]}
            yield image, text, measures


def _calibrated(prepare: Prepare, read: Callable[[], tuple[Features, Features]]) -> dict[str, Any]:
    features = read()
    found = calibrate(prepare, features, permutations=PERMUTATIONS, subsamples=0, seed=SEED)
    return {
        "value": found.value,
        "null_mean": found.null_mean,
        "calibrated": found.calibrated,
        "p_value": found.p_value,
        "n": len(features[0]),
    }


def _interval(
    prepare: Prepare, read: Callable[[], tuple[Features, Features]], value: float
) -> dict[str, Any]:
    """Return the interval of a value, None where halves of the rows have no k neighbours."""
    features = read()
    halves = HALVES if len(features[0]) // 2 > K else 0
    interval = half_sample_interval(prepare, features, value, subsamples=halves, seed=SEED)
    return {"ci95": interval}


@dataclass(frozen=True)
class _Labelled:
    """The rows of an image column that have a label."""

    column: Column
    rows: Int64[np.ndarray, "rows"]
    labels: Int64[np.ndarray, "rows"]


def _labelled(config: RunConfig, split: str, name: str) -> _Labelled:
    store = open_evaluated(config, run_folder(config), split)
    column = complete_column(store, f"image/{name}")
    labels = store.labels()
    rows = ok_rows(column)
    known = np.full(store.rows, -1) if labels is None else labels.astype(np.int64)
    rows = rows[known[rows] >= 0]
    return _Labelled(column, rows, known[rows])


def _knn(config: RunConfig, query: _Labelled, reference: _Labelled) -> dict[str, Any]:
    """Return the best accuracy over the k of the settings, as DINO reports it."""
    settings = config.eval
    ks = [k for k in settings.knn_k if k <= len(reference.rows)] or [len(reference.rows)]
    neighbours, about = find_neighbours(
        settings,
        _read(query.column, query.rows),
        lambda: feature_blocks(reference.column, reference.rows),
        len(reference.rows),
        max(ks),
    )
    num_classes = int(max(query.labels.max(), reference.labels.max())) + 1
    right = {
        k: query.labels
        == vote(
            neighbours,
            reference.labels,
            k=k,
            temperature=settings.knn_temperature,
            num_classes=num_classes,
        )
        for k in ks
    }
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
    interval = ratio_interval(right.astype(np.int64), resamples=resamples, seed=seed)
    return {"value": float(right.mean()), "ci95": interval, "n": len(right)}


def _spread(rows: StudyRows) -> StudyRows:
    """Return at most `ROWS` rows with a first caption, evenly from all."""
    usable = np.flatnonzero(rows.text_ok[:, 0])
    chosen = usable[np.linspace(0, len(usable) - 1, min(ROWS, len(usable))).astype(np.int64)]
    return StudyRows(rows.store, rows.fields, rows.rows[chosen], rows.text_ok[chosen])


def _read_both(
    image: Column, text: Column, rows: Int64[np.ndarray, "rows"]
) -> tuple[Features, Features]:
    return _read(image, rows), _read(text, rows)


def _read(column: Column, rows: Int64[np.ndarray, "rows"]) -> Float[np.ndarray, "rows dim"]:
    return np.concatenate(list(feature_blocks(column, rows))).astype(np.float32)


def _described(labelled: _Labelled) -> list[Any]:
    digest = hashlib.sha256(labelled.rows.tobytes() + labelled.labels.tobytes()).hexdigest()
    return [_fingerprint(labelled.column), digest]


def _fingerprint(column: Column) -> dict[str, Any]:
    kept = {name: of for name, of in column.fingerprint.items() if name not in NOT_COMPARED}
    return kept | {"column": str(column.path)}


def _go_on(stop: StopRequest, what: str) -> None:
    if stop():
        raise Stopped
    logger.debug("%s", what)
