"""How far embeddings drift with what should not change them: `sail eval --check`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

from align.checkpoint import load_head
from evaluate.embedder import Embedder
from evaluate.measures.retrieval import RetrievalSettings
from features.device.cuda import first_gpu
from features.encoders.image import check_fast
from features.errors import EncoderError, EvaluationError
from features.index import Index, SampleReader
from features.storage.files import write_json
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.progress import timed
from pipeline.run.aligned import Aligned
from pipeline.run.config import RunConfig
from pipeline.run.device import prepare_device
from pipeline.run.folder import RunFolder, open_store, run_folder

SCHEMA = 1
TIE = 1e-6
Embeddings = Float32[np.ndarray, "rows dim"]


@dataclass(frozen=True)
class Drift:
    """The same rows embedded in two ways; numbers are None where they could not be."""

    modality: str
    """`image` or `text`."""
    over: str
    """What differs: `store`, `batch size`, `padding`, `image mode` or `device`."""
    usual: str
    """The way of the run."""
    other: str
    """The way it is compared with, or why there is none."""
    max_abs_difference: float | None = None
    """Of any entry of the normalised embeddings."""
    min_cosine: float | None = None
    """Of a row with itself."""
    changed_neighbours: int | None = None
    """Rows whose nearest row of the other modality is another one."""


def check_run(config: RunConfig, stop: StopRequest) -> Path:
    """Embed some rows of a run anew in several ways, and write how far they differ to check.json.

    The rows are of the first split with captions that the head was not trained on.

    Raises:
        CheckpointError: There is no trained head.
        EncoderError: An encoder or an image cannot be used.
        EvaluationError: No row can be used, or the index is of other rows than the store.
        Stopped: A signal came; nothing was written.
    """
    folder = run_folder(config)
    device = prepare_device(config.run)
    model, checkpoint = load_head(folder.align / config.eval.checkpoint, device)
    aligned = Aligned.of_run(config, checkpoint, model, device)
    sample = _draw(aligned, folder)
    with timed(f"check of {len(sample.rows)} rows of {sample.split}"):
        drifts = [asdict(drift) for drift in _drifts(aligned, sample, stop)]
    tolerance = config.eval.check.tolerance
    document = {
        "schema": SCHEMA,
        "run": config.run.name,
        "checkpoint_sha256": checkpoint.sha256,
        "ok": not _too_far(drifts, tolerance),
        "drifts": drifts,
        "protocol": {
            "split": sample.split,
            "captions": [sample.field],
            "rows": len(sample.rows),
            "drawn_from": sample.rows_ok,
            "seed": config.eval.seed,
            "tolerance": tolerance,
            "tolerance_of": "1 - min_cosine",
            "neighbours": f"of the other modality among these rows; ties within {TIE} are equal",
            "device": str(device),
            "image_batch": aligned.image_batch,
            "image_mode": aligned.image_encoder.mode,
            "tokens_per_batch": aligned.text_encoder.tokens_per_batch,
        },
    }
    path = folder.eval / "check.json"
    write_json(path, document, allow_nan=False)
    return path


def refuse_drift(document: dict[str, Any]) -> None:
    """Raise where a check found more drift than is tolerated.

    Args:
        document: Of a check.json.

    Raises:
        EvaluationError: Naming each drift.
    """
    tolerance = document["protocol"]["tolerance"]
    found = [
        f"{drift['modality']} embeddings over {drift['over']} ({drift['usual']} against "
        f"{drift['other']}) by {1 - drift['min_cosine']:.2g}"
        for drift in _too_far(document["drifts"], tolerance)
    ]
    if found:
        raise EvaluationError(
            f"Embeddings drift more than eval.check.tolerance: {'; '.join(found)}. 1 − cosine of "
            f"{tolerance:g} at most was expected. Use one way for all that is compared, and "
            f"extract anew where the store differs; or raise the tolerance."
        )


def compare_embeddings(
    usual: Embeddings, other: Embeddings, candidates: Embeddings
) -> dict[str, Any]:
    """Say how far normalised embeddings of the same rows are from each other.

    Args:
        usual: Of the way of the run.
        other: Of another way.
        candidates: Among which the nearest of each row is looked for.

    Returns:
        `max_abs_difference`, `min_cosine` and `changed_neighbours`, as in `Drift`. A neighbour has
        not changed where both candidates are nearest within `TIE` in either way.

    Raises:
        EvaluationError: An entry is not finite.
    """
    if not np.isfinite(other).all():
        raise EvaluationError(
            "An embedding is not finite. Finite numbers were expected. Set `precision` of the "
            "encoder to float32."
        )
    first, second = usual.astype(np.float64), other.astype(np.float64)
    apart = first / np.linalg.norm(first, axis=1)[:, None]
    apart -= second / np.linalg.norm(second, axis=1)[:, None]
    before, after = first @ candidates.T, second @ candidates.T  # (rows, candidates)
    rows, old, new = np.arange(len(first)), before.argmax(1), after.argmax(1)
    changed = (before[rows, old] - before[rows, new] > TIE) & (
        after[rows, new] - after[rows, old] > TIE
    )
    return {
        "max_abs_difference": float(np.abs(first - second).max()),
        "min_cosine": 1 - float((apart**2).sum(1).max()) / 2,  # exactly 1 where they are equal
        "changed_neighbours": int(changed.sum()),
    }


def _too_far(drifts: list[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    return [
        drift
        for drift in drifts
        if drift["min_cosine"] is not None and 1 - drift["min_cosine"] > tolerance
    ]


@dataclass(frozen=True)
class _Sample:
    """Rows of a split with what the encoders read, and with what the store has of them."""

    split: str
    field: str
    rows: Int64[np.ndarray, "rows"]
    rows_ok: int
    """How many there were to draw from."""
    images: Sequence[bytes]
    captions: Sequence[str]
    stored: dict[str, Embeddings]
    """Embeddings of the features in the store, by modality."""


def _draw(aligned: Aligned, folder: RunFolder) -> _Sample:
    """Draw rows that have an image and a caption, and read both from the source."""
    config = aligned.config
    split, store = _split(config, folder)
    named = config.eval.of(RetrievalSettings).retrieval_fields
    searched = [field for field in named if field in store.fields]
    field = (searched or store.fields)[0]
    embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
    columns = {"image": embedder.image_column(store), "text": embedder.text_column(store, field)}
    both = np.intersect1d(columns["image"].ok_rows(), columns["text"].ok_rows())
    if not len(both):
        raise EvaluationError(
            f"{store.path} has no row with both an image and a caption {field!r} that are ok. At "
            f"least one was expected. See why with `sail inspect {store.path}`."
        )
    number = min(config.eval.check.rows, len(both))
    rows = np.sort(np.random.default_rng(config.eval.seed).choice(both, number, replace=False))
    index = Index.open(folder.index(split))
    _check_same_rows(index, store, rows)
    reader = SampleReader(index, max_pixels=aligned.max_pixels)
    return _Sample(
        split=split,
        field=field,
        rows=rows,
        rows_ok=len(both),
        images=[reader.read_row(int(row)) or b"" for row in rows],
        captions=[str(caption) for caption in store.strings_at(f"caption/{field}", rows)],
        stored={
            modality: np.concatenate(list(embedder.blocks(column, rows)))
            for modality, column in columns.items()
        },
    )


def _drifts(aligned: Aligned, sample: _Sample, stop: StopRequest) -> Iterator[Drift]:
    """Embed the sample as the run does, then in every other way."""
    images = aligned.encode_image(sample.images)
    texts = aligned.encode_text(sample.captions)
    for way in _ways(aligned, sample):
        stop.check()
        usual, candidates = (images, texts) if way.modality == "image" else (texts, images)
        found = compare_embeddings(usual, way.embed(), candidates) if way.embed else {}
        yield Drift(way.modality, way.over, way.usual, way.other, **found)


def _split(config: RunConfig, folder: RunFolder) -> tuple[str, FeatureStore]:
    """Return the first split with captions that is not trained on, else the one that is."""
    trained = config.trained_splits
    for split in [name for name in config.data if name not in trained]:
        store = open_store(config, folder, split)
        if store.fields:
            return split, store
    split = (*trained, *config.data)[0]
    return split, open_store(config, folder, split)


def _check_same_rows(index: Index, store: FeatureStore, rows: Int64[np.ndarray, "rows"]) -> None:
    keys = store.strings_at("key", rows)
    for row, key in zip(map(int, rows), map(str, keys), strict=True):
        found = index.rows_between(row, row + 1, ("key",)) if row < index.rows else None
        if found is None or found.column("key")[0].as_py() != key:
            raise EvaluationError(
                f"{index.path} does not have {key!r} in row {row}, but {store.path} has. The index "
                f"that the store was made from was expected. Use the run that extracted it."
            )


@dataclass(frozen=True)
class _Way:
    """Another way to embed the sample; see `Drift` for the words."""

    modality: str
    over: str
    usual: str
    other: str
    embed: Callable[[], Embeddings] | None = None
    """None where there is no such way."""


def _ways(aligned: Aligned, sample: _Sample) -> list[_Way]:
    return [
        _Way("image", "store", "encoded now", "as stored", lambda: sample.stored["image"]),
        _Way("text", "store", "encoded now", "as stored", lambda: sample.stored["text"]),
        *_image_batches(aligned, sample.images),
        *_text_batches(aligned, sample.captions),
        _image_mode(aligned, sample.images),
        *_devices(aligned, sample),
    ]


def _image_batches(aligned: Aligned, images: Sequence[bytes]) -> list[_Way]:
    """Return single images, and batches of which half are blank, as a compiled encoder fills up."""
    size, usual = aligned.image_batch, min(aligned.image_batch, len(images))
    half = max(1, usual // 2)
    single = aligned.with_image_encoder(batch_size=1)
    padded = aligned.with_image_encoder(has_fixed_batch=True)

    def in_halves() -> Embeddings:
        starts = range(0, len(images), half)
        return np.concatenate([padded.encode_image(images[i : i + half]) for i in starts])

    together, blank = f"{usual} at once", f"{half} and {size - half} blank"
    return [
        _Way("image", "batch size", together, "1", lambda: single.encode_image(images)),
        _Way("image", "padding", together, blank, in_halves),
    ]


def _text_batches(aligned: Aligned, captions: Sequence[str]) -> list[_Way]:
    def one_by_one() -> Embeddings:
        return np.concatenate([aligned.encode_text([caption]) for caption in captions])

    tokens = f"{aligned.text_encoder.tokens_per_batch} tokens"
    return [
        _Way("text", "batch size", tokens, "1 caption", one_by_one),
        _Way("text", "padding", "none", "not measured: captions are never padded"),
    ]


def _image_mode(aligned: Aligned, images: Sequence[bytes]) -> _Way:
    encoder = aligned.image_encoder
    mode = "exact" if encoder.mode == "fast" else "fast"
    try:
        check_fast("fast", encoder.preprocessing)
    except EncoderError:
        why = f"not measured: {encoder.preprocessing.processor} cannot be fast"
        return _Way("image", "image mode", encoder.mode, why)
    other = aligned.with_image_encoder(mode=mode)
    return _Way("image", "image mode", encoder.mode, mode, lambda: other.encode_image(images))


def _devices(aligned: Aligned, sample: _Sample) -> list[_Way]:
    device = other_device(aligned.device)
    usual = str(aligned.device)
    if device is None:
        why = "not measured: no other device"
        return [_Way(modality, "device", usual, why) for modality in ("image", "text")]
    there = aligned.on_device(device)
    return [
        _Way("image", "device", usual, str(device), lambda: there.encode_image(sample.images)),
        _Way("text", "device", usual, str(device), lambda: there.encode_text(sample.captions)),
    ]


def other_device(device: torch.device) -> torch.device | None:
    """Return the processor for a GPU, and for the processor a GPU if there is one."""
    if device.type != "cpu":
        return torch.device("cpu")
    mps = torch.device("mps") if torch.backends.mps.is_available() else None
    return first_gpu() or mps
