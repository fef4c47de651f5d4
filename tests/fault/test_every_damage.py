"""Every damage to every file of a store is found, and named, by `sail verify` and by docs/fsck.py.

The two share no code: the second is written from docs/store.md.
"""

import importlib.util
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from features.errors import SailError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.convert import convert_store
from pipeline.stores.repair import repair_store
from pipeline.stores.verify import find_faults, seal_store
from tests import tiny
from tests.commands import sail, the_error_of
from tests.feature_stores import as_version_1, make_store

ROOT = Path(__file__).parents[2]
EXTRA = "a file beside it"
FLIPS = 20
"""Bits of each file that are flipped, one at a time."""


def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fsck", ROOT / "docs" / "fsck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fsck = checker()


def faults_of(store: Path) -> list[str]:
    """What the independent checker finds."""
    checked = fsck.Store(store)
    checked.check()
    return list(checked.faults)


@dataclass(frozen=True)
class World:
    """Stores of one run, and what could come into their place."""

    store: Path
    foreign: Path
    """Of other images and captions, by the same encoders."""
    older: Path
    """The same, before rows were appended."""

    def files(self) -> list[str]:
        return sorted(
            path.relative_to(self.store).as_posix()
            for path in self.store.rglob("*")
            if path.is_file()
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("damage")
    run_file = tiny.world(folder, rows=18)
    (store, _) = extract(load_config(str(run_file)), StopRequest())
    assert isinstance(store, Path)
    older = shutil.copytree(store, folder / "older.zarr")
    tiny.write_tar(folder / "shards" / "train-2.tar", tiny.samples(4, first=500))
    extract(load_config(str(run_file)), StopRequest(), append=True)
    shutil.rmtree(folder / "shards")
    other = folder / "other"
    run_file = tiny.world(other, rows=18)
    for tar in (other / "shards").glob("train*"):
        tar.unlink()
    tiny.write_tar(other / "shards" / "train-0.tar", tiny.samples(22, first=700))
    (foreign, _) = extract(load_config(str(run_file)), StopRequest())
    assert isinstance(foreign, Path)
    return World(store, foreign, older)


def damages(world: World, name: str, flips: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield what can happen to a file: a word for it, and what it has then; None: it is deleted."""
    content = (world.store / name).read_bytes()
    generator = random.Random(name)
    for _ in range(flips):
        bit = generator.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(flipped)
    for size in {0, 1, len(content) // 2, len(content) - 1}:
        yield f"cut to {size}", content[:size]
    yield "zeroed", bytes(len(content))
    yield "longer", content + b"\0"
    yield "deleted", None
    yield EXTRA, content
    others = {"foreign": world.foreign / name, "older": world.older / name}
    siblings = [it for it in world.files() if it != name and Path(it).suffix == Path(name).suffix]
    for sibling in generator.sample(siblings, min(4, len(siblings))):
        others[f"replaced by {sibling}"] = world.store / sibling
    for word, other in others.items():
        if other.is_file() and other.read_bytes() != content:
            yield word, other.read_bytes()


def missed(world: World, copy: Path, name: str, word: str, content: bytes | None) -> list[str]:
    """Return which checkers do not name a file that is damaged in a copy of the store."""
    path = copy / name
    damaged = path.with_name(f"9{path.name}") if word == EXTRA else path
    named = str(damaged)
    if content is None:
        path.unlink()
        if "/status/c/" in name:
            named = f"{copy / name.partition('/status/c/')[0]}: chunk {path.name} is not done"
    else:
        damaged.write_bytes(content)
    found = {"verify": [str(fault) for fault in find_faults(copy)], "fsck": faults_of(copy)}
    damaged.unlink(missing_ok=True)
    shutil.copy(world.store / name, path)
    if name.endswith("manifest/zarr.json"):  # of another version: then what it speaks of is named
        return [by for by, faults in found.items() if not any(named in it for it in faults)]
    return [by for by, faults in found.items() if not any(it.startswith(named) for it in faults)]


def check(world: World, tmp_path: Path, flips: int, share: float = 1.0) -> int:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(world.store, copy)
    chosen, trials, wrong = random.Random(0), 0, []
    for name in world.files():
        for word, content in damages(world, name, flips):
            if chosen.random() < share:
                trials += 1
                by = missed(world, copy, name, word, content)
                wrong += [f"{name} {word}: missed by {by}"] if by else []
    assert not wrong
    assert find_faults(copy) == []
    assert faults_of(copy) == []
    return trials


def test_a_sample_of_all_damages_is_found_and_named(world: World, tmp_path: Path) -> None:
    assert check(world, tmp_path, flips=2, share=0.1) > 80


@pytest.mark.slow
def test_every_damage_to_every_file_is_found_and_named(world: World, tmp_path: Path) -> None:
    assert check(world, tmp_path, FLIPS) >= 2000


@pytest.mark.parametrize("array", ["key", "caption/long", "label", "group"])
def test_readers_refuse_rows_of_another_chunk(world: World, tmp_path: Path, array: str) -> None:
    copy = shutil.copytree(world.store, tmp_path / "copy.zarr")
    shutil.copy(copy / array / "c" / "0", copy / array / "c" / "1")
    store = FeatureStore.open(copy)
    store.values(array, 0, 8)
    with pytest.raises(SailError, match=rf"{array}/c/1 is damaged"):
        store.values(array)
    (copy / array / "c" / "1").unlink()
    with pytest.raises(SailError, match=rf"{array}/c/1 is damaged: the file is missing"):
        store.values(array)


@pytest.mark.parametrize("name", ["image/vit", "text/bert/long"])
def test_readers_refuse_features_of_another_chunk(world: World, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(world.store, tmp_path / "copy.zarr")
    column = FeatureStore.open(copy).column(name)
    whole = column.read(0, 22)
    shutil.copy(Path(str(column.features_file(0))), Path(str(column.features_file(1))))
    column = FeatureStore.open(copy).column(name)
    np.testing.assert_array_equal(column.read(0, 8), whole[:8])
    buffer = np.empty((column.rows_per_chunk, column.dim), column.dtype)
    for read in (
        lambda: column.read(9, 10),
        lambda: column.read_into(1, buffer),
        lambda: list(column.read_pieces(1, buffer[:3])),
        lambda: column.rows_at(np.array([0, 12])),
    ):
        with pytest.raises(SailError, match="features/c/1/0 is damaged: it is another chunk"):
            read()


def test_a_small_chunk_that_states_a_large_size_is_refused(world: World, tmp_path: Path) -> None:
    numcodecs = pytest.importorskip("numcodecs")
    copy = shutil.copytree(world.store, tmp_path / "copy.zarr")
    as_version_1(copy)
    bomb = numcodecs.Zstd().encode((2**31 - 1).to_bytes(4, "little"))
    (copy / "key" / "c" / "0").write_bytes(bomb)
    with pytest.raises(SailError, match="key/c/0 is damaged: it states 2147483647 strings, not 8"):
        FeatureStore.open(copy).keys()
    frame = b"\x28\xb5\x2f\xfd\xe0" + (2**62).to_bytes(8, "little") + b"\0\0\0"
    (copy / "key" / "c" / "0").write_bytes(frame)
    with pytest.raises(SailError, match=f"its content would have {2**62} bytes"):
        FeatureStore.open(copy).keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", -1), ("rows", "abc"), ("rows", None), ("rows", 10**15), ("rows_per_chunk", 0)],
)
def test_sizes_that_cannot_be_are_refused(
    world: World, tmp_path: Path, name: str, value: object
) -> None:
    copy = shutil.copytree(world.store, tmp_path / "copy.zarr")
    as_version_1(copy)
    about = json.loads((copy / "zarr.json").read_text("utf-8"))
    about["attributes"][name] = value
    (copy / "zarr.json").write_text(json.dumps(about))
    assert f"{name} is {value!r}" in sail("inspect", copy, expect=1).stderr


def test_a_store_of_version_1_is_read_and_sealed(world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.store, tmp_path / "copy.zarr")
    as_version_1(copy)
    store, now = FeatureStore.open(copy), FeatureStore.open(world.store)
    for name in store.row_arrays:
        assert store.values(name).tolist() == now.values(name).tolist()
    for name in store.columns():
        np.testing.assert_array_equal(store.column(name).read(0, 22), now.column(name).read(0, 22))
    shutil.copy(copy / "image/vit/features/c/0/0", copy / "image/vit/features/c/1/0")
    assert "as far as format version 1 can tell" in sail("verify", copy).stdout
    shutil.copy(world.store / "image/vit/features/c/1/0", copy / "image/vit/features/c/1/0")
    assert sail("verify", copy, "--seal").stdout == f"{copy} is whole.\n"
    assert faults_of(copy) == []
    shutil.copy(copy / "image/vit/features/c/0/0", copy / "image/vit/features/c/1/0")
    assert "features/c/1/0: it is another chunk" in sail("verify", copy, expect=1).stderr


def test_a_damaged_store_of_version_1_is_not_sealed(world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.store, tmp_path / "copy.zarr")
    as_version_1(copy)
    (copy / "image/vit/features/c/1/0").unlink()
    before = sorted(copy.rglob("*"))
    assert [fault.chunk for fault in seal_store(copy)] == [1]
    assert sorted(copy.rglob("*")) == before


def test_stores_that_are_made_of_stores_are_whole_for_both_checkers(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", bad_images=(3,), bad_captions=((5, 0),))
    convert_store(store.path, tmp_path / "int8.zarr", "int8", StopRequest())
    sail("rechunk", store.path, "--rows-per-chunk", 7, "--out", tmp_path / "finer.zarr")
    sail("subset", store.path, "--random", 50, "--out", tmp_path / "some.zarr")
    for path in ("s.zarr", "int8.zarr", "finer.zarr", "some.zarr"):
        assert find_faults(tmp_path / path) == []
        assert faults_of(tmp_path / path) == []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_file = tiny.world(tmp_path, rows=18)
    (store, _) = extract(load_config(str(run_file)), StopRequest())
    assert isinstance(store, Path)
    return store


def content_of(store: Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file())
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


def test_repair_gives_back_the_same_bytes(run: Path) -> None:
    before = content_of(run)
    whole = sail("repair", run).stdout
    assert whole == f"{run} is whole.\n"
    (run / "image/vit/features/c/0/0").write_bytes(bytes(10))
    shutil.copy(run / "text/bert/long/features/c/0/0", run / "text/bert/long/features/c/1/0")
    (run / "text/bert/short/identity/c/2/0").unlink()
    (run / "text/bert/short/status/c/1").write_bytes(b"")
    for name in ("key/c/1", "caption/long/c/0", "label/zarr.json", "image/vit/manifest/zarr.json"):
        (run / name).unlink()
    (run / "text/bert/zarr.json").write_bytes(b"{")
    done = sail("repair", run).stdout
    assert "image/vit: encoded again chunks 0\n" in done
    assert "text/bert/long: encoded again chunks 1\n" in done
    assert "text/bert/short: encoded again chunks 1, 2\n" in done
    assert content_of(run) == before


@pytest.mark.slow
def test_repair_gives_back_the_same_bytes_after_each_damage_of_a_chunk_of_features(
    run: Path, world: World, tmp_path: Path
) -> None:
    older = shutil.copytree(run, tmp_path / "older.zarr")
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(4, first=500))
    sail("extract", "--append", tmp_path / "tiny.toml")
    before, here, trials = content_of(run), World(run, world.foreign, older), 0
    for name in here.files():
        if "/features/c/" not in name:
            continue
        for word, content in damages(here, name, flips=3):
            if word == EXTRA:
                continue  # what is no file of the store is named, and left
            if content is None:
                (run / name).unlink()
            else:
                (run / name).write_bytes(content)
            repaired = repair_store(run, StopRequest())
            assert list(repaired.encoded.values()) == [[int(name.split("/")[-2])]], (name, word)
            assert (repaired.written, repaired.left) == ([], []), (name, word)
            assert content_of(run) == before, (name, word)
            trials += 1
    assert trials >= 100


@pytest.mark.parametrize("name", ["zarr.json", "manifest/zarr.json"])
def test_repair_writes_the_metadata_of_the_store_again(run: Path, name: str) -> None:
    before = content_of(run)
    (run / name).write_bytes((run / name).read_bytes()[:-5])
    assert f"{run / name}: written again" in sail("repair", run).stdout
    assert content_of(run) == before


def test_repair_says_what_it_cannot_repair(run: Path, tmp_path: Path) -> None:
    (run / "more").write_bytes(b"1")
    (run / "image/vit/features/c/0/0").unlink()
    done = sail("repair", run, expect=1)
    assert "image/vit: encoded again chunks 0" in done.stdout
    assert f"{run / 'more'}: it is no file of the store" in done.stderr
    lonely = make_store(tmp_path / "alone" / "s.zarr")
    Path(str(lonely.column("image/eye").features_file(0))).unlink()
    assert "does not lie in the folder of a run" in sail("repair", lonely.path, expect=1).stderr


def test_repair_does_not_take_images_of_a_source_that_changed(run: Path, tmp_path: Path) -> None:
    (run / "image/vit/features/c/0/0").unlink()
    before = content_of(run)
    tiny.write_tar(tmp_path / "shards" / "train-0.tar", tiny.samples(9, first=300))
    assert "changed" in sail("repair", run, expect=1).stderr
    assert content_of(run) == before


def rot(shard: Path) -> None:
    """Change a byte of an image, as a disk does: size and time stay."""
    times = shard.stat()
    content = bytearray(shard.read_bytes())
    content[content.index(b"\xff\xda") + 20] ^= 1  # within the scan of the first JPEG
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_images_that_rot_between_two_encoders_are_refused(run: Path, tmp_path: Path) -> None:
    before = content_of(run)
    rot(tmp_path / "shards" / "train-0.tar")
    recipe = tmp_path / "tiny.toml"
    sail("extract", recipe)  # whose columns are whole: no image is read
    second = f"encoders.image.second={{model = '{tmp_path / 'vit'}', pooling = 'mean'}}"
    error = the_error_of(sail("extract", recipe, "--set", second, expect=1))
    assert "The images of rows 0 to 7 (" in error
    assert "train-0.tar) are other bytes" in error
    assert "than those that image/vit was made of" in error
    after = content_of(run)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.startswith("image/second/status/c")]


def test_repair_says_that_images_rotted(run: Path, tmp_path: Path) -> None:
    (run / "image/vit/features/c/0/0").unlink()
    rot(tmp_path / "shards" / "train-0.tar")
    said = sail("repair", run, expect=1).stderr
    assert "its images are other bytes than they were, at the same size and time" in said
