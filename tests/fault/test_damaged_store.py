"""`sail verify` and readers name the chunk that is not what was written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from features.errors import StoreCorruptError, StoreError, StoreNotFoundError
from features.storage.column import Column
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import find_faults, verify_store
from tests import tiny
from tests.commands import sail
from tests.feature_stores import as_version_1, on_disk


@pytest.fixture
def column(tmp_path: Path) -> Column:
    run_file = tiny.world(tmp_path, rows=20)
    store = FeatureStore.open(extract(load_config(str(run_file)), StopRequest())[0])
    assert verify_store(store.path) == []
    return store.column("image/vit")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "crc32c does not match"),
        (cut_off, "bytes, not"),
        (Path.unlink, "missing although its rows are done"),
    ],
)
def test_verify_names_a_damaged_chunk(
    damage: Callable[[Path], None], words: str, column: Column
) -> None:
    damage(on_disk(column.features_file(1)))
    (fault,) = find_faults(on_disk(column.path).parents[1])
    assert fault.place == str(column.features_file(1))
    assert words in fault.what
    assert "Run `sail repair`" in fault.remedy


def test_verify_names_keys_that_occur_twice_and_keys_that_were_changed(column: Column) -> None:
    store = on_disk(column.path).parents[1]
    keys = zarr.open_array(store / "key", mode="r+")
    keys[[7, 11, 12]] = np.array([keys[2], keys[2], "other"], dtype=np.dtypes.StringDType())
    chunks = [str(store / "key" / "c" / chunk) for chunk in "01"]
    assert [fault.place for fault in find_faults(store)] == chunks
    as_version_1(store)
    first, second, changed = verify_store(store)
    assert first.startswith("row 7: the key 'train-0/00002' occurs twice")
    assert second.startswith("row 11: the key 'train-0/00002' occurs twice")
    assert "rows and features may not belong together" in changed


def test_deleting_the_status_chunk_lets_the_next_run_mend_the_store(
    column: Column, tmp_path: Path
) -> None:
    expected = column.read(0, column.rows)
    flip_a_bit(on_disk(column.features_file(1)))
    on_disk(column.status_file(1)).unlink()
    extract(load_config(str(tmp_path / "tiny.toml")), StopRequest())
    np.testing.assert_array_equal(column.read(0, column.rows), expected)


def test_a_cut_off_chunk_is_refused_when_it_is_read(column: Column) -> None:
    cut_off(on_disk(column.features_file(0)))
    buffer = np.empty((column.rows_per_chunk, column.dim), dtype=np.float16)
    with pytest.raises(StoreCorruptError, match="bytes, not"):
        column.read_into(0, buffer)


def test_a_store_that_is_not_there_or_of_another_format_is_refused(
    column: Column, tmp_path: Path
) -> None:
    with pytest.raises(StoreNotFoundError, match="no feature store"):
        FeatureStore.open(tmp_path / "nowhere.zarr")
    with pytest.raises(StoreError, match="format None"):
        FeatureStore.open(column.path.parent)


def test_an_unknown_column_is_refused_with_those_that_are_there(column: Column) -> None:
    with pytest.raises(StoreError, match=r"it has .*image/vit"):
        FeatureStore.open(on_disk(column.path).parents[1]).column("image/vti")


def test_a_column_without_its_metadata_is_not_left_out(column: Column) -> None:
    (on_disk(column.path) / "zarr.json").unlink()
    store = FeatureStore.open(on_disk(column.path).parents[1])
    with pytest.raises(StoreCorruptError, match=r"zarr\.json is damaged: the file is missing"):
        store.columns()


def test_verify_gives_its_faults_as_json_and_ends_with_1(column: Column) -> None:
    store = on_disk(column.path).parents[1]
    assert json.loads(sail("verify", store, "--json").stdout)["faults"] == []
    on_disk(column.features_file(1)).unlink()
    (fault,) = json.loads(sail("verify", store, "--json", expect=1).stdout)["faults"]
    assert "missing although its rows are done" in fault
