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
from jaxtyping import Float, Int64

from evaluate.cka import LinearCka
from evaluate.knn import nearest_neighbours, vote
from evaluate.linear_probe import fit_linear_probe
from evaluate.mutual_knn import Cknna, MutualKnn, nearest_others
from evaluate.permutation import Measure, calibrate
from evaluate.svcca import Svcca
from features.column import Column
from features.storage.files import write
from features.store import NOT_COMPARED
from pipeline.config import RunConfig
from pipeline.embedding.rows import complete_column, feature_blocks, ok_rows
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run import run_folder
from pipeline.stores import open_evaluated
from pipeline.study.rows import StudyRows, usable_rows

logger = logging.getLogger(__name__)
ROWS = 1000
"""Pairs on which encoders are compared: spread evenly over the training split."""
K = 10
PERMUTATIONS, SEED = 20, 0
HELD_OUT = 5
"""Every so many rows of the reference choose the regularisation of the linear probe."""
Features = Float[np.ndarray, "rows dim"]
PAIR_MEASURES: dict[str, Callable[[Features, Features], Measure]] = {
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
        votes = [config.eval.knn_temperature, config.eval.knn_k]
        found[name] = {}
        for measure, settings, take in (
            ("knn_top1", votes, partial(_knn, config)),
            ("linear_probe_top1", [HELD_OUT, SEED], _linear_probe),
        ):
            _go_on(stop, f"{measure} of {name}")
            found[name][measure] = kept.get(
                [measure, *rows, *settings], partial(take, query, reference)
            )
    return found


def measure_pairs(
    config: RunConfig, kept: Kept, stop: StopRequest
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the measures of every pair: its value, the null, and the value calibrated by it."""
    rows = _spread(usable_rows(config, config.align.split))
    for image in config.encoders.image_columns:
        column = rows.store.column(f"image/{image}")
        for text in config.encoders.text:
            texts = rows.store.column(f"text/{text}/{rows.fields[0]}")
            inputs = [rows.sha256, _fingerprint(column), _fingerprint(texts), K, PERMUTATIONS]
            measures = {}
            for name, prepare in PAIR_MEASURES.items():
                _go_on(stop, f"{name} of {image} and {text}")
                measures[name] = kept.get(
                    [name, *inputs],
                    partial(_calibrated, prepare, column, texts, rows.rows),
                )
            yield image, text, measures


def _calibrated(
    prepare: Callable[[Features, Features], Measure],
    image: Column,
    text: Column,
    rows: Int64[np.ndarray, "rows"],
) -> dict[str, Any]:
    first, second = _read(image, rows), _read(text, rows)
    found = calibrate(prepare, (first, second), permutations=PERMUTATIONS, subsamples=0, seed=SEED)
    return {
        "value": found.value,
        "null_mean": found.null_mean,
        "calibrated": found.calibrated,
        "p_value": found.p_value,
        "n": len(first),
    }


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
    ks = [k for k in config.eval.knn_k if k <= len(reference.rows)] or [len(reference.rows)]
    neighbours = nearest_neighbours(
        _read(query.column, query.rows),
        feature_blocks(reference.column, reference.rows),
        max(ks),
    )
    num_classes = int(max(query.labels.max(), reference.labels.max())) + 1
    accuracies = {
        k: float(
            np.mean(
                query.labels
                == vote(
                    neighbours,
                    reference.labels,
                    k=k,
                    temperature=config.eval.knn_temperature,
                    num_classes=num_classes,
                )
            )
        )
        for k in ks
    }
    best = max(accuracies, key=lambda k: accuracies[k])
    return {"value": accuracies[best], "k": best, "n": len(query.rows)}


def _linear_probe(query: _Labelled, reference: _Labelled) -> dict[str, Any]:
    order = np.random.default_rng(SEED).permutation(len(reference.rows))
    probe = fit_linear_probe(
        _read(reference.column, reference.rows), reference.labels, order % HELD_OUT == 0
    )
    predicted = probe.predict(_read(query.column, query.rows))
    accuracy = float(np.mean(predicted == query.labels))
    return {
        "value": accuracy,
        "regularisation": probe.regularisation,
        "converged": probe.converged,
        "n": len(query.rows),
    }


def _spread(rows: StudyRows) -> StudyRows:
    """Return at most `ROWS` rows with a first caption, evenly from all."""
    usable = np.flatnonzero(rows.text_ok[:, 0])
    chosen = usable[np.linspace(0, len(usable) - 1, min(ROWS, len(usable))).astype(np.int64)]
    return StudyRows(rows.store, rows.fields, rows.rows[chosen], rows.text_ok[chosen])


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
