"""A store that is there already takes further encoders, caption fields and rows."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import zarr

from features.errors import SourceError, StoreCorruptError
from features.status import Status
from features.storage.column import Column
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.feature_stores import StopBeforeChunks, as_version_1


def extracted(run_file: Path, *overrides: str, append: bool = False) -> FeatureStore:
    """Run stage one and open the training store."""
    config = load_config(str(run_file), overrides)
    return FeatureStore.open(extract(config, StopRequest(), append=append)[0])


def files(folder: Place) -> dict[str, bytes]:
    """Every file of a store, by its place."""
    assert isinstance(folder, Path)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which chunk of which column of the training store was computed, in order."""
    chunks: list[tuple[str, int]] = []
    write = Column.write

    def noted(column: Column, chunk: int, *rest: Any) -> None:
        if "train.zarr" in str(column.path):
            chunks.append((column.name, chunk))
        write(column, chunk, *rest)

    monkeypatch.setattr(Column, "write", noted)
    return chunks


def test_a_further_encoder_is_computed_and_nothing_else(
    tmp_path: Path, written: list[tuple[str, int]]
) -> None:
    run_file = tiny.world(tmp_path)
    before = files(extracted(run_file).path)
    written.clear()
    further = ["encoders.image.second.model='vit'", "encoders.image.second.pooling='mean'"]
    further[0] = f"encoders.image.second.model='{tmp_path / 'vit'}'"
    store = extracted(run_file, *further)
    assert {name for name, _ in written} == {"image/second"}
    after = files(store.path)
    assert {name: after[name] for name in before} == before
    assert verify_store(store.path) == []


def test_a_further_caption_field_is_computed_and_nothing_else(
    tmp_path: Path, written: list[tuple[str, int]]
) -> None:
    run_file = tiny.world(tmp_path)
    before = files(extracted(run_file, "data.train.captions=['short']").path)
    written.clear()
    store = extracted(run_file, "data.train.captions=['short','long']")
    assert {name for name, _ in written} == {"text/bert/long"}
    assert store.fields == ("long", "short")
    after = files(store.path)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"zarr.json", "manifest/zarr.json"}  # its source
    whole = extracted(
        run_file, "data.train.captions=['short','long']", f"run.dir='{tmp_path / 'fresh'}'"
    )
    assert after == files(whole.path)
    assert verify_store(store.path) == []


def test_further_captions_for_a_store_without_any_are_taken(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    bare = [(name, content) for name, content in tiny.samples(9) if name.endswith(".jpg")]
    table = tmp_path / "photos" / "table.jsonl"
    table.parent.mkdir()
    for name, content in bare:
        (table.parent / name).write_bytes(content)
    source = "data.train={kind='folder',path='" + str(table) + "'}"
    table.write_text("\n".join(json.dumps({"image": name}) for name, _ in bare))
    assert extracted(run_file, source).fields == ()
    table.write_text(
        "\n".join(json.dumps({"image": name, "caption": "a red star"}) for name, _ in bare)
    )
    store = extracted(run_file, source)
    assert store.fields == ("caption",)
    assert (store.column("text/bert/caption").status() == Status.OK).all()
    assert files(store.path) == files(
        extracted(run_file, source, f"run.dir='{tmp_path / 'fresh'}'").path
    )


@pytest.mark.parametrize("rows", [40, 42], ids=["full last chunk", "partial last chunk"])
def test_appended_shards_give_the_bytes_of_a_fresh_extraction(
    rows: int, tmp_path: Path, written: list[tuple[str, int]]
) -> None:
    run_file = tiny.world(tmp_path, rows=rows)
    extracted(run_file)
    written.clear()
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(13, first=500))
    store = extracted(run_file, append=True)
    assert store.rows == rows + 13
    assert min(chunk for _, chunk in written) == rows // 8  # chunks of old rows only stay
    fresh = extracted(run_file, f"run.dir='{tmp_path / 'fresh'}'")
    assert files(store.path) == files(fresh.path)
    assert verify_store(store.path) == []


def test_shards_that_sort_before_come_behind_all_the_same(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=42)
    old = extracted(run_file)
    keys = old.keys().tolist()
    tiny.write_tar(tmp_path / "shards" / "train-00.tar", tiny.samples(5, first=500))
    store = extracted(run_file, append=True)
    assert store.keys(0, 42).tolist() == keys
    assert store.keys(42).tolist() == [f"train-00/{number:05d}" for number in range(500, 505)]
    shards = tmp_path / "shards"
    order = [str(shards / f"train-{name}.tar") for name in ("0", "1", "00")]
    fresh = extracted(run_file, f"data.train.path={order}", f"run.dir='{tmp_path / 'fresh'}'")
    there, made = files(store.path), files(fresh.path)
    changed = {name for name in made if made[name] != there[name]}
    assert changed == {"zarr.json", "manifest/zarr.json"}  # its source
    assert there.keys() == made.keys()


def test_nothing_is_appended_by_accident(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    before = files(extracted(run_file).path)
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(3, first=500))
    with pytest.raises(SourceError, match="run `sail extract` with --append"):
        extracted(run_file)
    (tmp_path / "run" / "index" / "train.parquet").unlink()
    with pytest.raises(SourceError, match=r"has 40 rows, the index .* has 3 more.* --append"):
        extracted(run_file)
    assert files(tmp_path / "run" / "features" / "train.zarr") == before
    assert extracted(run_file, append=True).rows == 43


def test_rows_that_were_appended_are_finished_without_asking_again(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=42)
    extracted(run_file)
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(13, first=500))
    with pytest.raises(Stopped):
        extract(load_config(str(run_file)), StopBeforeChunks(tmp_path / "run"), append=True)
    store = FeatureStore.open(tmp_path / "run" / "features" / "train.zarr")
    column = store.column("image/vit")
    assert column.pending() == [5, 6]
    assert (column.status()[:40] == Status.OK).all()
    assert (column.status()[40:] == Status.PENDING).all()
    assert not column.read(40, 55).any()
    assert verify_store(extracted(run_file).path) == []


def test_appended_shards_may_bring_captions_and_labels_of_their_own(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    plain = [
        member
        for seed in range(20)
        for member in [
            (f"{seed}.jpg", tiny.encoded(tiny.picture(seed))),
            (f"{seed}.json", b'{"short": "a star"}'),
        ]
    ]
    tiny.write_tar(tmp_path / "shards" / "train-0.tar", plain)
    tiny.write_tar(tmp_path / "shards" / "train-1.tar", plain)
    store = extracted(run_file, "data.train.rows=30")
    assert (store.fields, store.labels(), store.rows) == (("short",), None, 30)
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(10))
    store = extracted(run_file, append=True)
    labels = store.labels()
    assert labels is not None
    assert labels.tolist() == [-1] * 40 + [0, 1, 2, 3, 4] * 2
    assert store.class_names == ("one", "two", "three", "four", "five")
    status = store.column("text/bert/long").status()
    assert (status[:40] == Status.MISSING_CAPTION).all()
    assert (status[40:] == Status.OK).all()
    assert files(store.path) == files(extracted(run_file, f"run.dir='{tmp_path / 'b'}'").path)


def test_a_store_that_was_killed_while_it_grew_has_its_old_rows(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=42)
    store = extracted(run_file)
    captions = store.captions("long").tolist()
    assert isinstance(store.path, Path)
    as_version_1(store.path)
    for name in ("key", "caption/long", "label", "group", "image/vit/status"):
        array = zarr.open_array(store.path / name, mode="r+")
        array.resize((55,))
    zarr.open_array(store.path / "image/vit/features", mode="r+").resize((55, 16))
    store = FeatureStore.open(store.path)
    assert len(store.keys()) == len(store.keys(0, 99)) == store.rows == 42
    assert store.captions("long").tolist() == captions
    labels = store.labels()
    assert labels is not None
    assert len(labels) == 42
    assert len(store.column("image/vit").status()) == 42
    assert verify_store(store.path) == []


def test_a_disk_that_fills_up_while_a_store_grows_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    before = files(extracted(run_file).path)
    tiny.write_tar(tmp_path / "shards" / "train-9.tar", tiny.samples(8, first=900))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("features.store.write_rows", refuse)
    with pytest.raises(OSError, match="No space left"):
        extracted(run_file, append=True)
    assert files(tmp_path / "run" / "features" / "train.zarr") == before


def test_a_chunk_that_a_command_of_before_wrote_without_the_appended_rows_is_found_out(
    tmp_path: Path,
) -> None:
    run_file = tiny.world(tmp_path, rows=12)
    column = extracted(run_file).column("image/vit")
    features, status = column.read(8, 12), column.status()[8:]
    tiny.write_tar(tmp_path / "shards" / "train-9.tar", tiny.samples(3, first=900))
    store = extracted(run_file, append=True)
    column.write(1, features, status)  # it knows of 12 rows
    with pytest.raises(
        StoreCorruptError, match="identity/c/1/0 is damaged: it is of another chunk"
    ):
        extracted(run_file)
    file = column.status_file(1)
    assert isinstance(file, Path)
    file.unlink()
    extracted(run_file)
    assert verify_store(store.path) == []


def test_an_index_that_was_made_before_a_signal_came_is_kept(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=12)

    class StopAtTheSecondSplit(StopRequest):
        def __call__(self) -> bool:
            return any((tmp_path / "run" / "index").glob(".train.parquet.*"))

    config = load_config(str(run_file), ["encoders.image={}", "encoders.text={}"])
    with pytest.raises(Stopped):
        extract(config, StopAtTheSecondSplit())
    there = [path.name for path in (tmp_path / "run" / "index").iterdir()]
    assert there == ["train.parquet"]
