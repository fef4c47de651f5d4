"""items.npz: what every test item scored, so that two runs can be compared item by item."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from features.storage.files import write

PARTS = ("hits", "counts", "classes")


@dataclass(frozen=True)
class Items:
    """The items of one number, in the order of the rows of the store.

    The number is Σ hits / Σ counts, or where there are classes, the mean of that over the classes.
    """

    hits: Int[np.ndarray, "items"]
    """What each item got right: 0 or 1, or of an image with several captions how many."""
    counts: Int[np.ndarray, "items"] | None = None
    """Out of how many; 1 each if not given."""
    classes: Int[np.ndarray, "items"] | None = None
    """The class of each, where the number is a mean over classes."""


def write_items(path: Path, items: Mapping[str, Items]) -> None:
    """Write the items of all numbers, each under the name of its result: whole, or not at all.

    The file is a NumPy archive of int32 arrays, `NAME.hits`, `NAME.counts` and `NAME.classes`; the
    latter two only where the number needs them.
    """
    arrays = {
        f"{name}.{part}": getattr(each, part).astype(np.int32)
        for name, each in items.items()
        for part in PARTS
        if getattr(each, part) is not None
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write(path, buffer.getvalue())


def read_items(path: Path) -> dict[str, Items]:
    """Read what `write_items` wrote; nothing where there is no such file."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as archive:
        names = [name.removesuffix(".hits") for name in archive.files if name.endswith(".hits")]
        return {name: Items(*(archive.get(f"{name}.{part}") for part in PARTS)) for name in names}
