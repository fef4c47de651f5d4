"""A store in 8 bits holds the same rows, can be read without this project, and is gone on with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from features.errors import StoreError, StoreMismatchError
from features.storage.column import Column
from features.store import FeatureStore
from pipeline.cli import cli
from pipeline.interrupt import Stopped, StopRequest
from pipeline.stores.convert import convert_store
from pipeline.stores.verify import verify_store
from tests.feature_stores import IMAGE, TEXT, StopAfter, make_store, on_disk

BAD = (0, 17)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "s.zarr", rows=100, image_dim=64, bad_images=BAD)


def test_the_copy_has_the_same_rows_status_and_nearly_the_same_features(
    store: FeatureStore, tmp_path: Path
) -> None:
    losses = convert_store(store.path, tmp_path / "out.zarr", "int8", StopRequest())
    copy = FeatureStore.open(tmp_path / "out.zarr")
    assert copy.keys().tolist() == store.keys().tolist()
    assert copy.captions("long").tolist() == store.captions("long").tolist()
    assert copy.columns() == store.columns()
    for name in store.columns():
        before, after = store.column(name), copy.column(name)
        assert after.dtype == np.int8
        assert after.fingerprint == before.fingerprint
        np.testing.assert_array_equal(after.status(), before.status())
        expected = before.read(0, 100).astype(np.float32)
        error = np.linalg.norm(after.read(0, 100) - expected, axis=1)
        norm = np.linalg.norm(expected, axis=1)
        relative = error[norm > 0] / norm[norm > 0]
        assert relative.max() < 0.01
        assert losses[name]["relative_error_max"] == pytest.approx(relative.max(), rel=1e-5)
        assert losses[name]["relative_error_mean"] == pytest.approx(relative.mean(), rel=1e-5)
        assert 0.9 < losses[name]["same_neighbours"] <= 1
    assert not copy.column(f"image/{IMAGE}").read(0, 100)[list(BAD)].any()


def test_plain_zarr_reads_the_features_as_whole_numbers_times_the_scale_of_the_row(
    store: FeatureStore, tmp_path: Path
) -> None:
    convert_store(store.path, tmp_path / "out.zarr", "int8", StopRequest())
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    column = f"image/{IMAGE}"
    values, scale = np.asarray(group[f"{column}/features"]), np.asarray(group[f"{column}/scale"])
    expected = FeatureStore.open(tmp_path / "out.zarr").column(column).read(0, 100)
    np.testing.assert_array_equal((values * scale[:, None]).astype(np.float16), expected)


def test_any_part_of_it_reads_as_the_whole_does(store: FeatureStore, tmp_path: Path) -> None:
    convert_store(store.path, tmp_path / "out.zarr", "int8", StopRequest())
    column = FeatureStore.open(tmp_path / "out.zarr").column(f"text/{TEXT}/long")
    whole = column.read(0, 100)
    for start, stop in [(0, 1), (15, 17), (40, 90), (95, 200)]:
        np.testing.assert_array_equal(column.read(start, stop), whole[start:stop])


def test_it_is_verified_as_any_store_and_a_damaged_scale_is_named(
    store: FeatureStore, tmp_path: Path
) -> None:
    convert_store(store.path, tmp_path / "out.zarr", "int8", StopRequest())
    assert verify_store(tmp_path / "out.zarr")[1:] == verify_store(store.path)[1:]
    file = on_disk(FeatureStore.open(tmp_path / "out.zarr").column(f"image/{IMAGE}").scale_file(1))
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    faults = verify_store(tmp_path / "out.zarr")
    assert any("scale/c/1: its crc32c does not match" in fault for fault in faults)


def test_a_conversion_that_was_stopped_goes_on_and_writes_no_chunk_again(
    store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    with pytest.raises(Stopped):
        convert_store(store.path, out, "int8", StopAfter(4))
    column = FeatureStore.open(out).column(f"image/{IMAGE}")
    assert column.pending() == [4, 5, 6]
    written = on_disk(column.features_file(3)).stat().st_mtime_ns
    convert_store(store.path, out, "int8", StopRequest())
    assert on_disk(column.features_file(3)).stat().st_mtime_ns == written
    assert not FeatureStore.open(out).column(f"text/{TEXT}/long").pending()


def test_a_chunk_whose_writing_was_killed_is_written_again(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.zarr"
    original = Column.write

    def killed(column: Column, chunk: int, *values: Any) -> None:
        original(column, chunk, *values)
        if chunk == 2:
            on_disk(column.status_file(chunk)).unlink()  # killed before the status was written
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Column, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            convert_store(store.path, out, "int8", StopRequest())
    assert not FeatureStore.open(out).column(f"image/{IMAGE}").read(32, 48).any()
    convert_store(store.path, out, "int8", StopRequest())
    assert FeatureStore.open(out).column(f"image/{IMAGE}").read(32, 48).any()


def test_a_store_that_is_not_done_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    on_disk(store.column(f"text/{TEXT}/long").status_file(3)).unlink()
    with pytest.raises(StoreError, match=r"text/reader/long has 1 chunks that are not done"):
        convert_store(store.path, tmp_path / "out.zarr", "int8", StopRequest())
    assert not (tmp_path / "out.zarr").exists()


def test_a_store_of_another_type_or_of_other_rows_is_not_written_over(
    store: FeatureStore, tmp_path: Path
) -> None:
    with pytest.raises(StoreMismatchError, match=r"dtype = 'float16'.* expects 'int8'"):
        convert_store(store.path, store.path, "int8", StopRequest())
    other = make_store(tmp_path / "other.zarr", rows=50)
    with pytest.raises(StoreMismatchError, match="keys_sha256"):
        convert_store(store.path, other.path, "int8", StopRequest())


def test_the_command_prints_what_was_lost_and_the_path_of_the_store(store: FeatureStore) -> None:
    done = CliRunner().invoke(cli, ["convert", str(store.path), "--dtype", "int8"])
    assert done.exit_code == 0, done.output
    assert "same 10 neighbours" in done.stdout
    assert done.stdout.splitlines()[-1] == str(store.path.parent / "s-int8.zarr")
