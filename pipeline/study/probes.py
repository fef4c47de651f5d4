"""Alignment probing: a short linear alignment of every pair of encoders, scored on the same rows.

run_dir/study/probes/IMAGE--TEXT/align/      the training, which resumes by itself
run_dir/study/probes/IMAGE--TEXT/probe.json  its time, and what it was scored on
run_dir/study/probes/IMAGE--TEXT/items.npz   what every image scored
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64

from align.checkpoint import load_head
from evaluate.items import Items, read_items, write_items
from evaluate.retrieval import Relevance, hits_per_image, retrieval_ranks
from features.storage.files import write
from pipeline.config import RunConfig, load_config
from pipeline.device import prepare_device
from pipeline.embedding.rows import Embedder
from pipeline.interrupt import Stopped, StopRequest
from pipeline.study.rows import StudyRows, scored_rows
from pipeline.training.stage import align_run

logger = logging.getLogger(__name__)
RECALL_AT = 10
WAYS = ("image_to_text", "text_to_image")


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
    recipe: str, overrides: Sequence[str], on: str | None, stop: StopRequest
) -> tuple[StudyRows, list[Probe]]:
    """Train and score every pair of an image column and a text encoder that was not before.

    The heads are LayerNorm and one matrix, and the loss the sigmoid; all else is as [align] says.

    Args:
        recipe: The run file, whose features are there.
        overrides: Settings over it.
        on: Split to score on; the held-out rows of the training split if not given.
        stop: Whether to stop.

    Raises:
        ConfigError: There is nothing to train or score on.
        Stopped: A signal came; the same call goes on from here.
    """
    config = load_config(recipe, overrides)
    rows = scored_rows(config, on)
    pairs = [(i, t) for i in config.encoders.image_columns for t in config.encoders.text]
    probes = []
    for number, (image, text) in enumerate(pairs, 1):
        if stop():
            raise Stopped
        logger.info("probe %d of %d: %s with %s", number, len(pairs), image, text)
        folder = config.run.dir / "study" / "probes" / f"{image}--{text}"
        given = {
            "run.dir": json.dumps(str(folder)),
            "run.features": json.dumps(str(config.run.features or config.run.dir)),
            "align.image": json.dumps(image),
            "align.text": json.dumps(text),
            "align.head.kind": '"linear"',
            "align.loss.kind": '"sigmoid"',
        }
        settings = [*overrides, *(f"{name}={value}" for name, value in given.items())]
        probes.append(_probe(load_config(recipe, settings), rows, stop))
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
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    of = {"checkpoint_sha256": checkpoint.sha256, "rows_sha256": rows.sha256}
    if known.get("checkpoint_sha256") == checkpoint.sha256:
        seconds = known["seconds"]  # this call found the training done
    if {name: known.get(name) for name in of} != of or not kept.is_file():
        embedder = Embedder(model, checkpoint, prepare_device(config.run))
        write_items(kept, _scored(embedder, rows))
        write(note, json.dumps(of | {"seconds": seconds}).encode())
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
    hits, counts = hits_per_image(ranks.by_text, owner, images=images, k=RECALL_AT)
    of_images = Items((ranks.by_image < RECALL_AT).astype(np.int64))
    return {WAYS[0]: of_images, WAYS[1]: Items(hits, counts)}


def _ratio(
    drawn: Int64[np.ndarray, "resamples images"], items: Items
) -> Float[np.ndarray, "resamples"]:
    counts = np.ones_like(items.hits) if items.counts is None else items.counts
    ratio: np.ndarray = (drawn @ items.hits) / np.maximum(drawn @ counts, 1)
    return ratio


def draws(images: int, *, resamples: int, seed: int) -> Int64[np.ndarray, "resamples images"]:
    """Return how often each image comes when as many are drawn anew, with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=resamples)


def probe_folder(config: RunConfig) -> Path:
    """Return where a study writes."""
    return config.run.dir / "study"
