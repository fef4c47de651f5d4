"""Writes the demo world as webdataset tars, the same bytes for the same settings."""

import io
import json
import logging
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from features.scenes.draw import draw
from features.scenes.world import (
    CLASS_NAMES,
    EVERY,
    SEEN,
    Scene,
    long_caption,
    pair_captions,
    sample_pair,
    sample_scene,
    short_caption,
)
from features.storage.files import write

logger = logging.getLogger(__name__)

SPLITS = {"train": 1, "test": 2, "compositional": 3}
"""The number of a split goes into the seed of each of its pictures; 0 is pre-training."""

PICTURE = 96
"""Side of a picture in pixels."""

WORLD_VERSION = 1
"""Raised when the same seed draws something else, so that older shards are drawn anew."""

ROWS_WORTH_A_POOL = 1500
PROCESSES = 2


@dataclass(frozen=True)
class SceneRow:
    """One row of a shard before it is drawn."""

    scene: Scene
    short: str
    long: str
    group: int | None = None


def write_shards(
    folder: Path, *, split: str, rows: int, seed: int, rows_per_shard: int = 1000
) -> list[Path]:
    """Draw a split of the demo world into `<split>-00000.tar` and so on, and `classes.txt`.

    A tar appears under its name only when it is whole, and one that is there is not drawn again. If
    the folder holds the split with other settings, that is removed first.

    Args:
        folder: Made if need be; several splits may share one.
        split: `train` shows no held-out combination; `test` shows all of them in natural
            proportion; `compositional` has two rows for each group, which differ by a swap.
        rows: Pictures in all.
        seed: What all pictures follow from; splits share none.
        rows_per_shard: Pictures in each tar but the last.

    Returns:
        The tars, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "classes.txt", "".join(f"{name}\n" for name in CLASS_NAMES).encode())
    _keep_only_same(folder, split, rows=rows, seed=seed, rows_per_shard=rows_per_shard)
    shards = {
        folder / f"{split}-{number:05d}.tar": range(start, min(start + rows_per_shard, rows))
        for number, start in enumerate(range(0, rows, rows_per_shard))
    }
    _draw_all(
        partial(_write_shard, split=split, seed=seed),
        {path: numbers for path, numbers in shards.items() if not path.exists()},
    )
    return list(shards)


def sample(split: str, seed: int, row: int) -> SceneRow:
    """Return what a row of a split shows and says, before it is drawn."""
    if split == "compositional":
        group, member = divmod(row, 2)
        source = (seed, SPLITS[split], group)
        pair = sample_pair(source)
        short, long = pair_captions(pair, (*source, 1))[member]
        return SceneRow(pair.scenes[member], short, long, group)
    source = (seed, SPLITS[split], row)
    scene = sample_scene(source, classes=SEEN if split == "train" else EVERY)
    return SceneRow(scene, short_caption(scene), long_caption(scene, (*source, 1)))


def _draw_all(draw_shard: Callable[[Path, range], None], shards: dict[Path, range]) -> None:
    """Draw shards in two processes where that is worth starting them."""
    if len(shards) < 2 or sum(map(len, shards.values())) < ROWS_WORTH_A_POOL:
        for path, rows in shards.items():
            draw_shard(path, rows)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        done = pool.map(draw_shard, shards.keys(), shards.values())
        for path, _ in zip(shards, done, strict=True):
            logger.info("drew %s", path.name)


def _write_shard(path: Path, rows: range, *, split: str, seed: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            for name, data in members(sample(split, seed, row)):
                member = tarfile.TarInfo(f"{row:06d}.{name}")  # owner 0, time 0: same bytes always
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write(path, buffer.getvalue())


def members(row: SceneRow) -> Iterator[tuple[str, bytes]]:
    """Draw a row, and yield what stands behind its number in a shard, with the bytes."""
    rgb, mask = draw(row.scene, PICTURE)
    text: dict[str, Any] = {"short": row.short, "long": row.long, "label": row.scene.label}
    if row.group is not None:
        text["group"] = row.group
    yield "jpg", _encode(rgb, "JPEG", quality=92, subsampling=0)
    yield "json", json.dumps(text).encode()
    yield "mask.png", _encode(mask, "PNG", compress_level=1)


def _encode(pixels: UInt8[np.ndarray, "height width *rgb"], kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _keep_only_same(folder: Path, split: str, **settings: int) -> None:
    """Remove the tars of a split that are of other settings, then note the present ones."""
    note = folder / f"{split}.json"
    wanted = json.dumps({"world": WORLD_VERSION, "split": split, **settings}).encode()
    if note.exists() and note.read_bytes() == wanted:
        return
    for tar in folder.glob(f"{split}-*.tar"):
        tar.unlink()
    write(note, wanted)
