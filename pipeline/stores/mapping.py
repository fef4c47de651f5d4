"""A store to be, made of arrays that someone else wrote: which array becomes what."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from features.errors import ConfigError, SourceError
from features.status import Status
from features.storage.column import encoder_of
from features.storage.rows import NUMBERS
from pipeline.stores.arrays import Arrays, stamp_of
from pipeline.stores.blocks import STRINGS, Block, Layout

logger = logging.getLogger(__name__)
PART = r"[^/.][^/]*"
COLUMN = re.compile(rf"image/{PART}|text/{PART}/{PART}")
PLAIN = re.compile(rf"key|label|group|caption/{PART}")
SHOWN = 30
MAX_LENGTH = 1 << 20
"""Of a vector of features: no encoder gives as many, and a chunk of them must fit in memory."""


class TakenRows:
    """The rows of arrays, checked as they come.

    Features become float16. Vectors that are all zero, or have a value that float16 cannot hold,
    are quarantined as `sail extract` does it: missing, or not finite. Where no keys are taken, rows
    are numbered.
    """

    def __init__(
        self,
        arrays: Arrays,
        taken: Mapping[str, str],
        *,
        stem: str,
        fingerprints: Mapping[str, Mapping[str, Any]],
        source: Mapping[str, Any],
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        """Check names and shapes.

        Args:
            arrays: What there is.
            taken: Names in the store (`key`, `label`, `group`, `caption/<field>`,
                `image/<encoder>`, `text/<encoder>/<field>`), and for each the name of an array.
            stem: What keys begin with where none are taken.
            fingerprints: What is known of encoders, by `image/<encoder>` and `text/<encoder>`.
            source: Where the arrays are from.
            class_names: Of the labels.

        Raises:
            ConfigError: A name in the store is of no such form, or there is no such array.
            SourceError: The arrays have not the same rows, or one has a shape that does not fit.
        """
        _check_names(arrays, taken)
        rows = _check_shapes(arrays, taken)
        for array in taken.values():  # before anything is made of what is not there
            arrays.read(array, 0, 1)
        self._arrays, self._taken, self._stem = arrays, dict(taken), stem
        self.stamp = stamp_of(arrays)
        self._columns = [name for name in taken if COLUMN.fullmatch(name)]
        fields = {f"caption/{name.split('/')[2]}" for name in self._columns if name[0] == "t"}
        captions = fields | {name for name in taken if name.startswith("caption/")}
        encoders = dict.fromkeys(map(encoder_of, self._columns))
        if unknown := sorted(set(fingerprints).difference(encoders)):
            raise ConfigError(
                f"Nothing is taken for the encoder {unknown[0]!r}. One of {list(encoders)} was "
                f"expected. Correct --about."
            )
        self.layout = Layout(
            rows=rows,
            names=("key", *sorted(captions), *(name for name in NUMBERS if name in taken)),
            columns={name: arrays.shapes[taken[name]][1] for name in self._columns},
            fingerprints={
                name: {"model": name.split("/")[1], "imported": True, **fingerprints.get(name, {})}
                for name in encoders
            },
            source=source,
            class_names=class_names,
        )

    def block(self, start: int, stop: int) -> Block:
        """Return rows `start` to `stop`; refuse values of a type that does not fit."""
        block = {name: self._plain(name, start, stop) for name in self.layout.names}
        for name in self._columns:
            values = self._arrays.read(self._taken[name], start, stop)
            if not np.issubdtype(values.dtype, np.floating):
                raise self._unfit(name, values.dtype, "Floating-point numbers")
            features, status = _usable(name, values)
            block[f"{name}/features"], block[f"{name}/status"] = features, status
            if values.dtype != np.float16 and start == 0:
                logger.info("%s: %s is rounded to float16", name, values.dtype)
        return block

    def _plain(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._taken:
            is_key = name == "key"
            texts = [f"{self._stem}/{row:09d}" if is_key else "" for row in range(start, stop)]
            return np.array(texts, dtype=STRINGS)
        values = self._arrays.read(self._taken[name], start, stop)
        if name in NUMBERS:
            try:
                numbers = values.astype(np.int64) if values.dtype == STRINGS else values
            except ValueError as error:
                raise self._unfit(name, "texts", "Whole numbers") from error
            if not np.issubdtype(numbers.dtype, np.integer):
                raise self._unfit(name, numbers.dtype, "Whole numbers")
            return numbers.astype(np.int32)
        if np.issubdtype(values.dtype, np.integer) and name == "key":
            return values.astype(str).astype(STRINGS)
        if values.dtype != STRINGS:
            raise self._unfit(name, values.dtype, "Texts")
        return values

    def _unfit(self, name: str, found: object, expected: str) -> SourceError:
        return SourceError(
            f"{self._taken[name]!r} holds {found}, which cannot be {name!r}. {expected} were "
            f"expected. Correct --take."
        )


def _usable(name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features as float16, zero where they cannot be used, and their status."""
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is told
        features = values.astype(np.float16)
    is_finite = np.isfinite(features).all(axis=1)
    is_image = name.startswith("image/")
    missing = Status.MISSING_IMAGE if is_image else Status.MISSING_CAPTION
    status = np.full(len(features), Status.OK, dtype=np.uint8)
    status[~features.any(axis=1)] = missing
    status[~is_finite] = Status.NOT_FINITE
    features[status != Status.OK] = 0
    return features, status


def _check_names(arrays: Arrays, taken: Mapping[str, str]) -> None:
    there = [f"{name} {shape}" for name, shape in list(arrays.shapes.items())[:SHOWN]]
    what = "\n  ".join(["It has:", *there, *(["…"] if len(arrays.shapes) > SHOWN else [])])
    if not any(COLUMN.fullmatch(name) for name in taken):
        raise ConfigError(
            f"No features are taken. At least one `--take image/NAME=ARRAY` or "
            f"`--take text/NAME/FIELD=ARRAY` was expected. Name an array. {what}"
        )
    for name, array in taken.items():
        if not (COLUMN.fullmatch(name) or PLAIN.fullmatch(name)):
            raise ConfigError(
                f"{name!r} is no name of a store. One of key, label, group, caption/FIELD, "
                f"image/NAME and text/NAME/FIELD was expected. Correct --take."
            )
        if array not in arrays.shapes:
            raise ConfigError(
                f"There is no array {array!r} for {name!r}. One that is there was expected. "
                f"Correct --take. {what}"
            )


def _check_shapes(arrays: Arrays, taken: Mapping[str, str]) -> int:
    """Return the rows, which all have."""
    first = next(iter(taken.values()))
    rows = next(iter(arrays.shapes[first]), 0)
    for name, array in taken.items():
        shape = arrays.shapes[array]
        if shape and shape[0] != rows:
            raise SourceError(
                f"{array!r} has {shape[0]} rows, {first!r} has {rows}: row {min(shape[0], rows)} "
                f"is in one of them only. As many rows in the same order were expected. Find out "
                f"which rows are missing, and write that array again."
            )
        if len(shape) != (2 if COLUMN.fullmatch(name) else 1) or 0 in shape:
            raise SourceError(
                f"{array!r} has shape {shape}, which cannot be {name!r}. Rows of "
                f"{'vectors' if COLUMN.fullmatch(name) else 'single values'} were expected. "
                f"Correct --take."
            )
        if math.prod(shape[1:]) > MAX_LENGTH:
            raise SourceError(
                f"{array!r} has vectors of {shape[1]} numbers. At most {MAX_LENGTH} were expected. "
                f"Take another array."
            )
    return rows
