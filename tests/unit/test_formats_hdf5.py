"""A store as an HDF5 file: read by plain h5py, and byte-identical when it comes back."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from features.errors import SourceError, StoreError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.stores.convert import Wanted, convert_store, export_store, import_store
from pipeline.stores.verify import verify_store
from tests.commands import sail, the_error_of
from tests.feature_stores import IMAGE, TEXT, make_store, on_disk

GO_ON = StopRequest()


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "s.zarr", rows=100, bad_images=(0, 17), bad_captions=((3, 0),))


def chunks_of(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name != "zarr.json"
    }


def test_the_file_is_read_by_plain_h5py(store: FeatureStore, tmp_path: Path) -> None:
    out = export_store(store.path, "hdf5", tmp_path / "s.h5", GO_ON)
    with h5py.File(out) as file:
        features = file[f"image/{IMAGE}/features"]
        assert features.dtype == np.float16
        assert features.chunks == (store.rows_per_chunk, features.shape[1])
        expected = store.column(f"image/{IMAGE}").read(0, 100)
        np.testing.assert_array_equal(features[:], expected)
        assert file["key"].asstr()[7] == str(store.keys()[7])
        assert file["caption/long"].asstr()[7] == str(store.captions("long")[7])
        assert (file[f"image/{IMAGE}/status"][[0, 1, 17]] == 1).tolist() == [False, True, False]


def test_a_store_comes_back_byte_identical(store: FeatureStore, tmp_path: Path) -> None:
    file, copy = tmp_path / "s.h5", tmp_path / "copy.zarr"
    assert sail("convert", store.path, "--to", "hdf5", "--out", file).stdout == f"{file}\n"
    assert sail("import-store", file, "--out", copy).stdout == f"{copy}\n"
    assert chunks_of(copy) == chunks_of(on_disk(store.path))
    again = FeatureStore.open(copy)
    assert again.attributes == store.attributes
    assert again.class_names == store.class_names
    for name in store.columns():
        assert again.column(name).fingerprint == store.column(name).fingerprint
    assert verify_store(copy) == verify_store(store.path)


def test_eight_bits_are_written_as_the_values_they_stand_for(
    store: FeatureStore, tmp_path: Path
) -> None:
    convert_store(store.path, tmp_path / "int8.zarr", "int8", GO_ON)
    file = export_store(tmp_path / "int8.zarr", "hdf5", tmp_path / "s.h5", GO_ON)
    column = FeatureStore.open(import_store(file, tmp_path / "copy.zarr", Wanted(), GO_ON)).column(
        f"text/{TEXT}/long"
    )
    expected = FeatureStore.open(tmp_path / "int8.zarr").column(f"text/{TEXT}/long")
    np.testing.assert_array_equal(column.read(0, 100), expected.read(0, 100))
    assert column.dtype == np.float16


def test_a_store_that_is_not_complete_is_not_exported(store: FeatureStore, tmp_path: Path) -> None:
    on_disk(store.column(f"image/{IMAGE}").status_file(2)).unlink()
    with pytest.raises(StoreError, match=r"1 chunks that are not done\. .*was expected\."):
        export_store(store.path, "hdf5", tmp_path / "s.h5", GO_ON)
    assert not (tmp_path / "s.h5").exists()


def swap_keys(file: h5py.File) -> None:
    file["key"][0], file["key"][1] = file["key"][1], file["key"][0]


def shorten_status(file: h5py.File) -> None:
    status = file[f"image/{IMAGE}/status"][:-1]
    del file[f"image/{IMAGE}/status"]
    file[f"image/{IMAGE}/status"] = status


def keep_features_elsewhere(file: h5py.File) -> None:
    del file[f"image/{IMAGE}/features"]
    elsewhere = [("/etc/hostname", 0, h5py.h5f.UNLIMITED)]
    file.create_dataset(f"image/{IMAGE}/features", (100, 1), np.uint8, external=elsewhere)


def link_features_elsewhere(file: h5py.File) -> None:
    del file[f"image/{IMAGE}/features"]
    file[f"image/{IMAGE}/features"] = h5py.ExternalLink("other.h5", "/x")


def forget_status(file: h5py.File) -> None:
    del file[f"text/{TEXT}/long/status"]


def forget_the_rows(file: h5py.File) -> None:
    del file.attrs["rows"]


def have_broken_attributes(file: h5py.File) -> None:
    file.attrs["source"] = "{"


def have_features_in_float64(file: h5py.File) -> None:
    features = file[f"image/{IMAGE}/features"][:].astype(np.float64)
    del file[f"image/{IMAGE}/features"]
    file[f"image/{IMAGE}/features"] = features


def have_numbers_as_keys(file: h5py.File) -> None:
    del file["key"]
    file["key"] = np.arange(100)


def have_a_status_of_floats(file: h5py.File) -> None:
    del file[f"image/{IMAGE}/status"]
    file[f"image/{IMAGE}/status"] = np.ones(100)


def be_of_a_later_version(file: h5py.File) -> None:
    file.attrs["format_version"] = "2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_keys, r"has keys of sha256 \w+, but says"),
        (shorten_status, r"status has shape \(99,\), not 100 rows"),
        (keep_features_elsewhere, "features keeps its values in another file"),
        (forget_status, f"text/{TEXT}/long has no status"),
        (have_numbers_as_keys, "key holds int64"),
        (have_a_status_of_floats, "image/eye/status holds float64"),
        (be_of_a_later_version, "it has format_version 2"),
        (forget_the_rows, r"it has rows and rows_per_chunk = \[None, 16\]"),
        (have_broken_attributes, "The attributes of .* cannot be read"),
        (have_features_in_float64, "features is float64 of shape"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_refused(
    store: FeatureStore, tmp_path: Path, damage: Callable[[h5py.File], None], message: str
) -> None:
    path = export_store(store.path, "hdf5", tmp_path / "s.h5", GO_ON)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(SourceError, match=f"{message}.* expected") as caught:
        import_store(path, tmp_path / "copy.zarr", Wanted(), GO_ON)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "copy.zarr").exists()


def test_a_link_to_another_file_is_not_followed(store: FeatureStore, tmp_path: Path) -> None:
    path = export_store(store.path, "hdf5", tmp_path / "s.h5", GO_ON)
    with h5py.File(path, "r+") as file:
        link_features_elsewhere(file)
    copy = FeatureStore.open(import_store(path, tmp_path / "copy.zarr", Wanted(), GO_ON))
    assert copy.columns() == [name for name in store.columns() if name != f"image/{IMAGE}"]


def test_what_cannot_be_done_is_said_in_one_line(store: FeatureStore, tmp_path: Path) -> None:
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    for arguments, message in [
        (("import-store", text, "--out", tmp_path / "copy.zarr"), "text.h5 cannot be read"),
        (("import-store", text, "--out", store.path), "There is something at"),
        (("convert", tmp_path / "none.zarr", "--to", "hdf5"), "There is no feature store"),
    ]:
        assert message in the_error_of(sail(*arguments, expect=1))
    assert "either --dtype or --to" in sail("convert", store.path, expect=2).stderr


def test_a_caption_with_a_nul_is_refused_by_its_row(tmp_path: Path) -> None:
    words = {name: [f"{name} {row}" for row in range(40)] for name in ("bare", "long")}
    words["long"][21] = "before\0after"
    store = make_store(tmp_path / "s.zarr", rows=40, captions=words)
    out = tmp_path / "s.h5"
    error = the_error_of(sail("convert", store.path, "--to", "hdf5", "--out", out, expect=1))
    assert "caption/long of row 21 has a NUL character" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zarr"]
    sail("convert", store.path, "--to", "parquet", "--out", tmp_path / "s-parquet")
