"""What a flipped bit, a missing or a swapped file does to a store, and to what others would use.

Every file of a small data set (keys, captions, labels, features of 64 float16, in chunks of 256
rows) is damaged in each way, and all of it is read again. What a reader returns is then right, an
error, or something else without a word. `icechunk`, `lance` and `pyarrow` are taken from the
environment that this runs in; those that are missing are left out.

    python -m tests.benchmarks.damage [--json] [FORMAT ...]
"""

import importlib.util
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROWS, DIM, CHUNK = 2_000, 64, 256
TRIALS = 2_000
"""Bits that are flipped one at a time, in all files together."""
MEMORY = 12 << 30
"""Bytes that a reader may take: damaged sizes are believed by some."""
Data = dict[str, np.ndarray]


def data(seed: int, rows: int = ROWS) -> Data:
    """Return the arrays of a data set."""
    generator = np.random.default_rng(seed)
    return {
        "key": np.array([f"shard-{seed}/{row:06d}" for row in range(rows)], dtype=object),
        "caption": np.array(
            [f"a {seed} caption of row {row}" for row in range(rows)], dtype=object
        ),
        "label": generator.integers(0, 50, rows).astype(np.int32),
        "features": generator.standard_normal((rows, DIM)).astype(np.float16),
    }


@dataclass(frozen=True)
class Format:
    """How a format is written, extended by rows, and read."""

    needs: str
    write: Callable[[Path, Data], None]
    append: Callable[[Path, Data], None]
    """Writes all rows where the first of them are there."""
    read: Callable[[Path], Data]


def write_ours(path: Path, values: Data) -> None:
    """Write a feature store."""
    from features.store import FeatureStore
    from tests.feature_stores import ListedRows

    lists = {"key": "key", "caption/0": "caption", "label": "label"}
    rows = ListedRows({name: values[of].tolist() for name, of in lists.items()})
    store = FeatureStore.create(path, rows, rows_per_chunk=CHUNK)
    store.add_encoder("image/e", {"model": "e", "dim": DIM}, dim=DIM)
    column = store.column("image/e")
    for chunk in range(column.num_chunks):
        features = values["features"][chunk * CHUNK : (chunk + 1) * CHUNK]
        column.write(chunk, features, np.ones(len(features), dtype=np.uint8))


def read_ours(path: Path) -> Data:
    """Read a feature store as evaluation does."""
    from features.store import FeatureStore

    store = FeatureStore.open(path)
    column = store.column("image/e")
    assert (column.status() == 1).all()
    return {
        "key": store.keys(),
        "caption": store.captions("0"),
        "label": store.values("label"),
        "features": column.read(0, store.rows),
    }


def verify_ours(path: Path) -> Data:
    """Ask `sail verify`, and read."""
    from pipeline.stores.verify import find_faults

    if faults := find_faults(path):
        raise ValueError(str(faults[0]))
    return read_ours(path)


def _write_zarr(group: Any, values: Data) -> None:
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    for name, array in values.items():
        is_text = array.dtype == object
        codecs: dict[str, Any] = {"compressors": [ZstdCodec(), Crc32cCodec()]}
        if name == "features":
            codecs = {"compressors": [Crc32cCodec()], "serializer": BytesCodec()}
        made = group.create_array(
            name,
            shape=array.shape,
            chunks=(CHUNK, *array.shape[1:]),
            dtype="string" if is_text else array.dtype,
            overwrite=True,
            **codecs,
        )
        made[:] = array.astype(np.dtypes.StringDType()) if is_text else array


def write_zarr(path: Path, values: Data) -> None:
    """Write a Zarr v3 group with crc32c behind every chunk."""
    import zarr

    _write_zarr(zarr.open_group(path, mode="a"), values)


def read_zarr(path: Path) -> Data:
    """Read a Zarr group."""
    import zarr

    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(group[name][:]) for name in data(0, 1)}  # type: ignore[index]


def write_icechunk(path: Path, values: Data) -> None:
    """Commit a Zarr group to an Icechunk repository."""
    import icechunk
    import zarr

    repository = icechunk.Repository.open_or_create(icechunk.local_filesystem_storage(str(path)))
    session = repository.writable_session("main")
    _write_zarr(zarr.open_group(session.store, mode="a"), values)
    session.commit("rows")


def read_icechunk(path: Path) -> Data:
    """Read the main branch of an Icechunk repository."""
    import icechunk
    import zarr

    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    group = zarr.open_group(repository.readonly_session("main").store, mode="r")
    return {name: np.asarray(group[name][:]) for name in data(0, 1)}  # type: ignore[index]


def _table(values: Data) -> Any:
    import pyarrow as pa

    features = pa.FixedSizeListArray.from_arrays(pa.array(values["features"].ravel()), DIM)
    columns = {name: pa.array(values[name].tolist()) for name in ("key", "caption", "label")}
    return pa.table(columns | {"features": features})


def _arrays(table: Any) -> Data:
    features = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    found = {name: np.array(table[name].to_pylist()) for name in ("key", "caption", "label")}
    return found | {"features": features.reshape(-1, DIM)}


def write_lance(path: Path, values: Data) -> None:
    """Write a Lance dataset, a fragment a chunk; a second call writes a second version."""
    import lance

    lance.write_dataset(
        _table(values), path, mode="overwrite", max_rows_per_file=CHUNK, max_rows_per_group=CHUNK
    )


def read_lance(path: Path) -> Data:
    """Read the latest version of a Lance dataset."""
    import lance

    return _arrays(lance.dataset(path).to_table())


def write_parquet(path: Path, values: Data) -> None:
    """Write parquet files of a chunk each, with checksums of pages."""
    import pyarrow.parquet as pq

    path.mkdir(exist_ok=True)
    table = _table(values)
    for number, first in enumerate(range(0, len(table), CHUNK)):
        part = table.slice(first, CHUNK)
        pq.write_table(part, path / f"{number:05d}.parquet", write_page_checksum=True)


def read_parquet(path: Path) -> Data:
    """Read all parquet files of a folder, and verify the checksums of pages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.glob("*.parquet"))
    tables = [pq.read_table(file, page_checksum_verification=True) for file in files]
    return _arrays(pa.concat_tables(tables))


FORMATS = {
    "sail verify": Format("zarr", write_ours, write_ours, verify_ours),
    "sail, readers": Format("zarr", write_ours, write_ours, read_ours),
    "Zarr with crc32c": Format("zarr", write_zarr, write_zarr, read_zarr),
    "Icechunk": Format("icechunk", write_icechunk, write_icechunk, read_icechunk),
    "Lance": Format("lance", write_lance, write_lance, read_lance),
    "Parquet with page checksums": Format("pyarrow", write_parquet, write_parquet, read_parquet),
}


def damages(
    whole: Path, foreign: Path, older: Path, names: list[str]
) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield name of a file, kind of damage, and what the file has then; None: it is deleted."""
    for name in names:
        content = (whole / name).read_bytes()
        generator = random.Random(name)
        for _ in range(-(-TRIALS // len(names)) if content else 0):
            bit = generator.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            yield name, "flipped", bytes(flipped)
        for size in sorted({len(content) // 2, max(0, len(content) - 1)}):
            yield name, "cut", content[:size]
        yield name, "zeroed", bytes(len(content))
        yield name, "deleted", None
        others = [it for it in names if it != name and Path(it).suffix == Path(name).suffix]
        near = [it for it in others if Path(it).parent == Path(name).parent] or others
        for sibling in generator.sample(near, min(3, len(near))):
            yield name, "swapped", (whole / sibling).read_bytes()
        for kind, folder in (("of another store", foreign), ("older", older)):
            if (other := _counterpart(folder, whole, name)) is not None:
                yield name, kind, other.read_bytes()


def _counterpart(folder: Path, whole: Path, name: str) -> Path | None:
    """Return the file of another data set that has this place, by name or else by order."""
    if (folder / name).is_file():
        return folder / name
    parent = Path(name).parent
    here = sorted(it.name for it in (whole / parent).iterdir() if it.is_file())
    there = sorted(it for it in (folder / parent).glob("*") if it.is_file())
    number = here.index(Path(name).name)
    return there[number] if number < len(there) else None


def outcome(read: Callable[[Path], Data], path: Path, expected: Data) -> str:
    """Read a damaged data set: `right`, `error`, or `wrong` without a word."""
    try:
        found = read(path)
        same = all(
            found[name].shape == values.shape and (found[name].astype(values.dtype) == values).all()
            for name, values in expected.items()
        )
    except BaseException:  # noqa: BLE001 - a panic of Rust is no Exception
        return "error"
    return "right" if same else "wrong"


def worker(name: str, folder: Path, first: int) -> None:
    """Try every damage from one on; a line of output for each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chosen, expected, copy = FORMATS[name], data(0), folder / "copy"
    names = sorted(
        path.relative_to(folder / "whole").as_posix()
        for path in (folder / "whole").rglob("*")
        if path.is_file()
    )
    trials = damages(folder / "whole", folder / "foreign", folder / "older", names)
    for number, (file, kind, content) in enumerate(trials):
        if number < first or content == (folder / "whole" / file).read_bytes():
            continue
        if content is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(content)
        print(f"{number}\t{kind}\t{outcome(chosen.read, copy, expected)}", flush=True)
        shutil.copy2(folder / "whole" / file, copy / file)
    print("end", flush=True)


def tried(name: str, folder: Path) -> dict[str, Counter[str]]:
    """Damage a data set of a format in every way; return how often each came out, by kind."""
    chosen = FORMATS[name]
    counts: dict[str, Counter[str]] = {}
    chosen.write(folder / "whole", data(0, ROWS - 100))
    shutil.copytree(folder / "whole", folder / "older")
    if name.startswith("sail"):
        shutil.rmtree(folder / "whole")
    chosen.append(folder / "whole", data(0))
    chosen.write(folder / "foreign", data(1))
    first, is_done = 0, False
    while not is_done:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "copy")
        command = [sys.executable, "-m", "tests.benchmarks.damage", "--worker", name, str(folder)]
        done = subprocess.run(
            [*command, str(first)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
        )
        lines = done.stdout.decode().splitlines()
        is_done = bool(lines) and lines[-1] == "end"
        for line in lines:
            if line.count("\t") == 2:  # Icechunk prints its warnings in between
                number, kind, how = line.split("\t")
                counts.setdefault(kind, Counter())[how] += 1
                first = int(number) + 1
        if not is_done:  # the process died of it: that is no silence
            counts.setdefault("died", Counter())["error"] += 1
            first += 1
    return counts


def main() -> None:
    """Print a table, a line for each format."""
    arguments = [it for it in sys.argv[1:] if it != "--json"]
    if arguments[:1] == ["--worker"]:
        worker(arguments[1], Path(arguments[2]), int(arguments[3]))
        return
    results = {}
    for name in arguments or FORMATS:
        if importlib.util.find_spec(FORMATS[name].needs) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results[name] = tried(name, Path(folder))
    if "--json" in sys.argv:
        print(json.dumps(results))
        return
    kinds = ("flipped", "cut", "zeroed", "deleted", "swapped", "of another store", "older")
    print("| read by | trials | wrong, silently | " + " | ".join(kinds) + " |")
    for name, counts in results.items():
        total: Counter[str] = sum(counts.values(), Counter())
        cells = [
            f"{counts.get(k, Counter())['wrong']}/{counts.get(k, Counter()).total()}" for k in kinds
        ]
        print(f"| {name} | {total.total()} | {total['wrong']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
