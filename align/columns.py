"""The columns that a training reads, and which of their rows are trained on or held out."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt8

from align.config import AlignConfig
from features.errors import TrainingError
from features.status import Status
from features.storage.column import Column
from features.storage.fingerprint import Fingerprint
from features.storage.rows import KEYS_AT_ONCE
from features.store import FeatureStore, rows_by_key, store_key_hashes

# Settings of [align] that are left out of the description of a training:
RECORDED_SEPARATELY = {"image", "text", "store", "text_store"}  # as encoders and rows
WITHOUT_EFFECT = {"cache", "cache_mb", "host_memory_mb", "verify"}  # on the result
logger = logging.getLogger(__name__)


class JoinedStore(FeatureStore):
    """A store of images, with the captions and text features of another one."""

    def __init__(self, images: FeatureStore, texts: FeatureStore) -> None:
        """Join two stores.

        Raises:
            TrainingError: They have not the same rows.
        """
        check_same_rows(images, texts)
        super().__init__(images.path, images.document, images.manifest)
        self.texts = texts

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Caption fields of the store of texts."""
        return self.texts.fields

    def captions(self, field: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return one caption per row, from the store of texts."""
        return self.texts.captions(field, start, stop)

    def strings_at(self, name: str, rows: Int64[np.ndarray, "rows"]) -> np.ndarray:
        """Return keys from the store of images, captions from that of texts."""
        if name.startswith("caption/"):
            return self.texts.strings_at(name, rows)
        return super().strings_at(name, rows)

    def columns(self) -> list[str]:
        """Names of the image columns and text columns, each from its own store."""
        images = [name for name in super().columns() if name.startswith("image/")]
        return images + [name for name in self.texts.columns() if name.startswith("text/")]

    def column(self, name: str) -> Column:
        """Open one column, from its own store."""
        return self.texts.column(name) if name.startswith("text/") else super().column(name)


def check_same_rows(image: FeatureStore, text: FeatureStore) -> None:
    """Refuse two stores that have not the same keys in the same order.

    Raises:
        TrainingError: The first key that differs is named, and whether it is only the order.
    """
    if image.keys_sha256 != text.keys_sha256:
        row = _first_difference(image, text)
        raise _differing(image, text, row)
    if image.rows_per_chunk != text.rows_per_chunk:
        raise TrainingError(
            f"{image.path} has {image.rows_per_chunk} rows per chunk, {text.path} has "
            f"{text.rows_per_chunk}. The same number was expected. Write one of them again by "
            f"`sail rechunk`."
        )


def _first_difference(image: FeatureStore, text: FeatureStore) -> int:
    shared = min(image.rows, text.rows)
    for start in range(0, shared, KEYS_AT_ONCE):
        stop = min(start + KEYS_AT_ONCE, shared)
        differs = image.keys(start, stop) != text.keys(start, stop)
        if differs.any():
            return start + int(differs.argmax())
    return shared


def _differing(image: FeatureStore, text: FeatureStore, row: int) -> TrainingError:
    keys = [
        repr(str(store.keys(row, row + 1)[0])) if row < store.rows else "beyond its end"
        for store in (image, text)
    ]
    _, is_there = rows_by_key(store_key_hashes(text), store_key_hashes(image))
    how = "They have other keys: extract both from the same sources."
    if is_there.all():
        how = (
            f"All keys of the one are in the other: `sail reorder {text.path} --like {image.path} "
            f"--out STORE` writes these rows in that order. Name that store instead."
        )
    return TrainingError(
        f"{image.path} and {text.path} have not the same rows: row {row} is {keys[0]} in the one "
        f"and {keys[1]} in the other. The same keys in the same order were expected. {how}"
    )


@dataclass(frozen=True)
class Columns:
    """The image column and the text columns, one per caption field; each may be a joined one."""

    store: FeatureStore
    image: Column
    text: tuple[Column, ...]
    fields: tuple[str, ...]

    @classmethod
    def open(cls, store: FeatureStore, config: AlignConfig, image: str, text: str) -> "Columns":
        """Open the columns that a training reads.

        Raises:
            StoreError: A column is not there.
            TrainingError: The store has not the caption fields that the settings name, or none of
                them has a weight.
        """
        fields = _fields(store.texts if isinstance(store, JoinedStore) else store, config)
        columns = cls(
            store=store,
            image=store.column(f"image/{image}"),
            text=tuple(store.column(f"text/{text}/{field}") for field in fields),
            fields=fields,
        )
        columns._check_texts()
        return columns

    def _check_texts(self) -> None:
        """Refuse caption fields whose features cannot lie in one array."""
        of_first = self.text[0].parts
        pairs = [pair for text in self.text[1:] for pair in zip(text.parts, of_first, strict=True)]
        for column, first in pairs:
            for what, found, expected in [
                ("dim", column.dim, first.dim),
                ("dtype", column.dtype.name, first.dtype.name),
            ]:
                if found != expected:
                    raise TrainingError(
                        f"{column.path} has {what} = {found}, but {first.path} has {expected}. The "
                        f"same was expected of all caption fields. Extract or convert both again, "
                        f"or name one of them in align.fields."
                    )


def open_columns(
    stores: Sequence[FeatureStore], config: AlignConfig, image: str, text: str
) -> list[Columns]:
    """Open what a training reads of each store, and check that it goes together.

    Raises:
        StoreError: A column is not there.
        TrainingError: The stores have not the caption fields that they should, or their features
            are not of the same encoders.
    """
    opened = [Columns.open(each, config, image, text) for each in stores]
    for columns in opened[1:]:
        for ours, other in [(opened[0].image, columns.image), (opened[0].text[0], columns.text[0])]:
            for pair in zip(ours.parts, other.parts, strict=True):
                _check_same_encoder(*pair)
    return opened


def describe(
    columns: Sequence[Columns], weights: Sequence[float], config: AlignConfig, seed: int
) -> dict[str, Any]:
    """Describe what decides the result of a training, as JSON."""
    first = columns[0]
    described: dict[str, Any] = {
        "align": config.model_dump(mode="json", exclude=RECORDED_SEPARATELY | WITHOUT_EFFECT),
        "seed": seed,
        "fields": list(first.fields),
        "image": _describe_encoder(first.image),
        "text": _describe_encoder(first.text[0]),
        "store": _describe_rows(first),
    }
    if len(columns) > 1:
        described["mixed"] = [
            {**_describe_rows(each), "fields": list(each.fields), "weight": weight}
            for each, weight in zip(columns, weights, strict=True)
        ]
    return described


def _describe_encoder(column: Column) -> dict[str, Any]:
    """Describe what a head reads, as JSON: of several columns `dims` by their names too."""
    described = {
        "name": column.name.split("/")[1],
        "dim": column.dim,
        "fingerprint": column.fingerprint,
    }
    if len(column.parts) > 1:
        described["dims"] = dict(zip(column.fingerprint, column.dims, strict=True))
        scaled = [part.name.split("/")[1] for part in column.parts if part.is_scaled]
        return described | ({"int8": scaled} if scaled else {})
    return described | ({"dtype": column.dtype.name} if column.is_scaled else {})


def _describe_rows(columns: Columns) -> dict[str, Any]:
    return {"rows": columns.store.rows, "keys_sha256": columns.store.keys_sha256}


def _check_same_encoder(ours: Column, other: Column) -> None:
    found = Fingerprint(other.fingerprint | {"dim": other.dim})
    for name, value, expected in found.differences(ours.fingerprint | {"dim": ours.dim}):
        raise TrainingError(
            f"{other.path} has {name} = {value!r}, but {ours.path} has {expected!r}. Features of "
            f"the same encoder were expected in all stores of align.mix. Extract one of them again."
        )


@dataclass(frozen=True)
class Selection:
    """How each row of a store is used."""

    train: Bool[np.ndarray, "rows"]
    """Rows to train on."""
    heldout: Int64[np.ndarray, "queries"]
    """Rows that are scored during training, in order."""
    text_ok: Bool[np.ndarray, "rows fields"]
    """Captions that can be used."""
    skipped: dict[str, int]
    """Number of rows that are not used, by reason."""


def select_rows(
    columns: Columns, *, holdout: float, holdout_rows: int, rows: int | None = None
) -> Selection:
    """Choose rows by their status and the hash of their key.

    A row is used when its image is ok and at least one of its captions is; captions that are not
    are left out of the loss. Of the rows held out, those with the smallest hashes are scored.

    Args:
        columns: The columns that are trained on.
        holdout: Fraction of rows kept from training.
        holdout_rows: At most this many of them are scored.
        rows: At most this many are trained on, those with the smallest hashes, so that a larger
            number has all rows of a smaller one; all if not given.

    Raises:
        TrainingError: No row is left to train on.
    """
    status = columns.image.status()
    text_ok = np.stack([column.status() == Status.OK for column in columns.text], axis=1)
    usable = (status == Status.OK) & text_ok.any(axis=1)
    skipped = _skipped(status, usable)
    for reason, count in skipped.items():
        _say_once(count, str(columns.store.path), reason)
    held = np.zeros_like(usable)
    heldout = np.empty(0, dtype=np.int64)
    hashes = np.empty(0, dtype=np.uint64)
    if holdout > 0 or rows is not None:
        hashes = store_key_hashes(columns.store)
    if holdout > 0:
        held = below_fraction(hashes, holdout) & usable
        heldout = np.sort(_by_hash(held, hashes)[:holdout_rows])
        if not len(heldout):
            what = "align.holdout = %g keeps no row of %s: nothing is scored during training"
            logger.warning(what, holdout, columns.store.path)
    train = usable & ~held
    if rows is not None:
        if rows > (there := int(train.sum())):
            what = "align.rows asks for %d rows of %s, which has %d to train on: all are used"
            logger.warning(what, rows, columns.store.path, there)
        train[_by_hash(train, hashes)[rows:]] = False
    if not train.any():
        raise TrainingError(
            f"No row of {columns.store.path} is left to train on: {int(held.sum())} are held out, "
            f"and {sum(skipped.values())} cannot be used. At least align.batch_size rows were "
            f"expected. Lower align.holdout, or see why with `sail inspect {columns.store.path}`."
        )
    return Selection(train, heldout, text_ok, skipped)


@cache
def _say_once(count: int, path: str, reason: str) -> None:
    """Say it once for a store: a study trains tens of heads on it."""
    rows = "1 row" if count == 1 else f"{count} rows"
    logger.info("%s of %s cannot be used: %s", rows, path, reason)


def below_fraction(hashes: Shaped[np.ndarray, "rows"], fraction: float) -> Bool[np.ndarray, "rows"]:
    """Say which hashes lie in the first fraction of all numbers of their size.

    Rows are held out by the hashes of their keys: the same ones in every run, on every machine and
    in any order, and a larger fraction keeps those of a smaller one.
    """
    return hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def _skipped(status: UInt8[np.ndarray, "rows"], usable: Bool[np.ndarray, "rows"]) -> dict[str, int]:
    counts = Counter(status[status != Status.OK].tolist())
    skipped = {f"image: {Status(code).label}": count for code, count in sorted(counts.items())}
    if without := int(((status == Status.OK) & ~usable).sum()):
        skipped["no caption that can be used"] = without
    return skipped


def _by_hash(
    chosen: Bool[np.ndarray, "rows"], hashes: Shaped[np.ndarray, "rows"]
) -> Int64[np.ndarray, "chosen"]:
    """Sort the chosen rows by their hashes."""
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(hashes[rows], kind="stable")]


def _fields(store: FeatureStore, config: AlignConfig) -> tuple[str, ...]:
    fields, weights = config.fields or store.fields, config.loss.field_weights
    named = {"align.fields": fields, "align.loss.field_weights": weights}
    for setting, names in named.items():
        if unknown := sorted(set(names) - set(store.fields)):
            raise TrainingError(
                f"{setting} names {unknown}, but {store.path} has the caption fields "
                f"{list(store.fields)}. Names among these were expected. Correct {setting}."
            )
    if not fields:
        raise TrainingError(
            f"{store.path} has no captions. At least one caption field was expected. Name "
            f"those of the source in its `captions`, or in align.split a split that has some."
        )
    if not any(weights.get(name, 1.0) for name in fields):
        raise TrainingError(
            f"align.loss.field_weights gives all caption fields, {list(fields)}, the weight 0. A "
            f"weight above 0 was expected for one of them. Correct align.loss.field_weights."
        )
    return fields
