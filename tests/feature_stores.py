"""Small feature stores on disk whose images and captions share what there is to learn."""

import hashlib
from pathlib import Path

import numpy as np
import zarr

from features.status import Status
from features.storage.column import create_column
from features.storage.place import Place
from features.store import FORMAT, FORMAT_VERSION, FeatureStore
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


def store_digests(run: Path) -> dict[str, str]:
    """Hash every file of a run's stores; what a writer left half-written would show too."""
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "features").rglob("*"))
        if path.is_file()
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
    group = zarr.create_group(path)
    _strings(group, "key", keys, rows_per_chunk)
    for field in fields:
        words = captions[field] if captions else [f"{field} of {row}" for row in range(rows)]
        _strings(group, f"caption/{field}", words, rows_per_chunk)
    for name, dim in [(f"image/{IMAGE}", image_dim), (f"text/{TEXT}", text_dim)]:
        encoder = group.create_group(name, attributes={"model": name, "dim": dim})
        for column in [encoder] if name.startswith("image") else map(encoder.create_group, fields):
            create_column(column, rows, dim, rows_per_chunk)
    group.attrs.update(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rows": rows,
            "rows_per_chunk": rows_per_chunk,
            "keys_sha256": hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest(),
            "source": {},
        }
    )
    store = FeatureStore.open(path)
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


def _strings(group: zarr.Group, name: str, values: list[str], rows_per_chunk: int) -> None:
    array = group.create_array(name, shape=(len(values),), chunks=(rows_per_chunk,), dtype="string")
    array[:] = np.array(values, dtype=np.dtypes.StringDType())


def _write(store: FeatureStore, name: str, features: np.ndarray, status: np.ndarray) -> None:
    column = store.column(name)
    for chunk in range(column.num_chunks):
        part = slice(chunk * column.rows_per_chunk, (chunk + 1) * column.rows_per_chunk)
        column.write(chunk, features[part], status[part])
