"""Stores of any size with synthetic features, written through the store's own code."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from features.index import build_index
from features.sources.folder import FolderSource
from features.status import Status
from features.storage.column import Column
from features.store import FeatureStore
from tests import tiny


def synthetic_store(
    folder: Path,
    *,
    rows: int,
    image_dim: int,
    text_dim: int,
    rows_per_chunk: int = 4096,
    fields: tuple[str, ...] = ("caption",),
) -> FeatureStore:
    """Write a store with one image column and some caption fields of random features."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "table.jsonl"
    with table.open("w") as lines:
        for row in range(rows):
            captions = dict.fromkeys(fields, f"row {row}")
            lines.write(json.dumps({"image": f"{row:09d}.jpg"} | captions) + "\n")
    source = FolderSource(kind="folder", path=table, captions=fields)
    index = build_index(source.open(), folder / "index.parquet")
    store = FeatureStore.create(folder / "store.zarr", index, rows_per_chunk=rows_per_chunk)
    store.add_encoder("image/synthetic", {"model": "synthetic"}, dim=image_dim)
    store.add_encoder("text/synthetic", {"model": "synthetic"}, dim=text_dim)
    random = np.random.default_rng(0)
    for name in store.columns():
        column = store.column(name)
        block = random.standard_normal((rows_per_chunk, column.dim), dtype=np.float32)
        for chunk in range(column.num_chunks):
            features = np.roll(block, chunk, axis=0)[: column.chunk_rows(chunk)].astype(np.float16)
            status = np.full(len(features), Status.OK, dtype=np.uint8)
            column.write(chunk, features, status)
    return store


def webdataset_shards(folder: Path, *, shards: int, samples: int, image_bytes: int = 0) -> str:
    """Write a tar of small real JPEGs and JSON captions under many names; return its pattern.

    The names are hard links to one file, so that a million samples take no room on the disk.
    The JPEGs have 682 bytes, or `image_bytes` with zeros behind their end.
    """
    jpeg = tiny.encoded(tiny.picture(0, 8, 8)).ljust(image_bytes, b"\0")
    members = []
    for sample in range(samples):
        record = {"caption": f"{tiny.caption(sample % 1000)} {sample}", "width": 8, "height": 8}
        members += [
            (f"{sample:07d}.jpg", jpeg),
            (f"{sample:07d}.json", json.dumps(record).encode()),
        ]
    first = tiny.write_tar(folder / "00000.tar", members)
    for shard in range(1, shards):
        (folder / f"{shard:05d}.tar").hardlink_to(first)
    return str(folder / "*.tar")


def linked_store(
    path: Path, *, gigabytes: float, image_dim: int, text_dim: int, rows_per_chunk: int = 1024
) -> FeatureStore:
    """Write a store of any size in little space: every chunk is a link to the first of its column.

    Keys and captions are empty strings.
    """
    chunks = max(2, round(gigabytes * 1e9 / (2 * (image_dim + text_dim) * rows_per_chunk)))
    rows = _EmptyRows(chunks * rows_per_chunk)
    store = FeatureStore.create(path, rows, rows_per_chunk=rows_per_chunk)
    store.add_encoder("image/synthetic", {"model": "synthetic"}, dim=image_dim)
    store.add_encoder("text/synthetic", {"model": "synthetic"}, dim=text_dim)
    random = np.random.default_rng(0)
    for name in store.columns():
        column = store.column(name)
        features = random.standard_normal((rows_per_chunk, column.dim), dtype=np.float32)
        status = np.full(rows_per_chunk, Status.OK, dtype=np.uint8)
        column.write(0, features.astype(np.float16), status)
        _link_chunks(column)
    return store


@dataclass
class _EmptyRows:
    rows: int
    source: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    row_arrays: tuple[str, ...] = ("key", "caption/0")

    def blocks(
        self, names: Sequence[str], rows: int, *, first: int = 0
    ) -> Iterator[dict[str, list[str]]]:
        for start in range(first, self.rows, rows):
            yield dict.fromkeys(names, [""] * (min(start + rows, self.rows) - start))


def _link_chunks(column: Column) -> None:
    assert column.identities is not None
    first_one = column.identities.of(0)
    for chunk in range(1, column.num_chunks):
        crcs = {"features": first_one.features, "scale": 0, "status": first_one.status}
        column.identities.write(chunk, **crcs)
        for file, first in [
            (column.features_file(chunk), column.features_file(0)),
            (column.status_file(chunk), column.status_file(0)),
        ]:
            linked = Path(str(file))
            linked.parent.mkdir(parents=True, exist_ok=True)
            linked.hardlink_to(str(first))
