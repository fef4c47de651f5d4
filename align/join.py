"""Two stores of the same rows: images of one go with texts of the other."""

from functools import cached_property

import numpy as np
from jaxtyping import Int64

from features.column import Column
from features.errors import TrainingError
from features.keys import rows_by_key, store_key_hashes
from features.store import FeatureStore

KEYS_AT_ONCE = 65_536


class JoinedStore(FeatureStore):
    """A store of images, with the captions and text features of another one."""

    def __init__(self, images: FeatureStore, texts: FeatureStore) -> None:
        """Join two stores.

        Raises:
            TrainingError: They have not the same rows.
        """
        check_same_rows(images, texts)
        super().__init__(images.path, images._group)
        self._texts = texts

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Caption fields of the store of texts."""
        return self._texts.fields

    def captions(self, field: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return one caption per row, of the store of texts."""
        return self._texts.captions(field, start, stop)

    def strings_at(self, name: str, rows: Int64[np.ndarray, "rows"]) -> np.ndarray:
        """Return keys of the one store, captions of the other."""
        if name.startswith("caption/"):
            return self._texts.strings_at(name, rows)
        return super().strings_at(name, rows)

    def columns(self) -> list[str]:
        """Names of the image columns of the one store and of the text columns of the other."""
        images = [name for name in super().columns() if name.startswith("image/")]
        return images + [name for name in self._texts.columns() if name.startswith("text/")]

    def column(self, name: str) -> Column:
        """Open one column, of the store that it is in."""
        return self._texts.column(name) if name.startswith("text/") else super().column(name)


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
