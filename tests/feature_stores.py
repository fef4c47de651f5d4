"""Small feature stores on disk whose images and captions share what there is to learn."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from features.status import Status
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.interrupt import StopRequest

IMAGE, TEXT = "eye", "reader"
LATENT = 6


def on_disk(place: Place) -> Path:
    """Return a place of a store that a test made on local disk as the path that it is."""
    return Path(str(place))


class StopBeforeChunks(StopRequest):
    """A signal that comes as soon as the stores of a run have chunks to do."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._run = run

    def __call__(self) -> bool:
        stores = [FeatureStore.open(path) for path in self._run.glob("features/*.zarr")]
        return any(store.column(name).pending() for store in stores for name in store.columns())


class StopAfter(StopRequest):
    """A signal that comes after some chunks."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks

    def __call__(self) -> bool:
        self.chunks -= 1
        return self.chunks < 0


def as_version_1(store: Path) -> None:
    """Take from a store what version 2 added, as one that was made before has it."""
    for folder in [*store.rglob("manifest"), *store.rglob("identity"), *store.glob("key_hash")]:
        shutil.rmtree(folder)
    for array in [store / "key", *store.glob("caption/*"), store / "label", store / "group"]:
        if (file := array / "zarr.json").is_file():
            about = json.loads(file.read_text("utf-8"))
            if about["codecs"][-1]["name"] != "crc32c":
                continue
            about["codecs"].pop()
            file.write_text(json.dumps(about, indent=2))
            for chunk in array.glob("c/*"):
                chunk.write_bytes(chunk.read_bytes()[:-4])
    about = json.loads((store / "zarr.json").read_text("utf-8"))
    about["attributes"]["format_version"] = 1
    (store / "zarr.json").write_text(json.dumps(about, indent=2))


@dataclass
class ListedRows:
    """Rows of a store to be, as lists by the name of the array."""

    values: Mapping[str, Sequence[Any]]
    source: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.rows = len(self.values["key"])

    @property
    def row_arrays(self) -> tuple[str, ...]:
        return tuple(self.values)

    def blocks(
        self, names: Sequence[str], rows: int, *, first: int = 0
    ) -> Iterator[dict[str, Sequence[Any]]]:
        for start in range(first, self.rows, rows):
            yield {name: self.values[name][start : start + rows] for name in names}


def store_digests(run: Path) -> dict[str, str]:
    """Hash every file of a run's stores; what a writer left half-written would show too."""
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "features").rglob("*"))
        if path.is_file() and path != run / "features" / "config.toml"
    }


def make_store(
    path: Path,
    *,
    rows: int = 200,
    rows_per_chunk: int = 16,
    image_dim: int = 8,
    text_dim: int = 10,
    fields: tuple[str, ...] = ("bare", "long"),
    bad_images: tuple[int, ...] = (),
    bad_captions: tuple[tuple[int, int], ...] = (),
    captions: dict[str, list[str]] | None = None,
    seed: int = 0,
) -> FeatureStore:
    """Write a store of which every chunk is done.

    The features of a pair are two random maps of one latent vector, with a little noise.

    `bad_images` are rows whose image is quarantined, `bad_captions` pairs of a row and the number
    of a field. The words of the captions are all different unless given, by field.
    """
    generator = np.random.default_rng(seed)
    keys = [f"shard/{row:06d}" for row in range(rows)]
    values = {"key": keys}
    for name in fields:
        words = captions[name] if captions else [f"{name} of {row}" for row in range(rows)]
        values[f"caption/{name}"] = words
    store = FeatureStore.create(path, ListedRows(values), rows_per_chunk=rows_per_chunk)
    for name, dim in [(f"image/{IMAGE}", image_dim), (f"text/{TEXT}", text_dim)]:
        store.add_encoder(name, {"model": name, "dim": dim}, dim=dim)
    latent = generator.standard_normal((rows, LATENT))
    names = [f"image/{IMAGE}", *(f"text/{TEXT}/{field}" for field in fields)]
    for number, name in enumerate(names):
        dim = image_dim if number == 0 else text_dim
        features = np.tanh(latent @ generator.standard_normal((LATENT, dim)))
        features += 0.05 * generator.standard_normal(features.shape)
        status = np.full(rows, Status.OK, dtype=np.uint8)
        if number == 0:
            status[list(bad_images)] = Status.NOT_AN_IMAGE
        else:
            bad = [row for row, field in bad_captions if field == number - 1]
            status[bad] = Status.MISSING_CAPTION
        features[status != Status.OK] = 0
        _write(store, name, features.astype(np.float16), status)
    return store


def make_run(folder: Path, align: str) -> Path:
    """Write a run whose features are there, and return its run file; `align` is that section."""
    (folder / "features").mkdir(parents=True)
    make_store(folder / "features" / "train.zarr")
    path = folder / "run.toml"
    path.write_text(
        f"""
[run]
dir = "{folder}"
[data.train]
kind = "folder"
path = "table.jsonl"
[encoders.image.{IMAGE}]
model = "none"
[encoders.text.{TEXT}]
model = "none"
[align]
{align}
"""
    )
    return path


def _write(store: FeatureStore, name: str, features: np.ndarray, status: np.ndarray) -> None:
    column = store.column(name)
    for chunk in range(column.num_chunks):
        part = slice(chunk * column.rows_per_chunk, (chunk + 1) * column.rows_per_chunk)
        column.write(chunk, features[part], status[part])
