"""What `sail inspect` says of features is what numpy says of them, whatever the chunks."""

import json
from pathlib import Path

import numpy as np
import pytest

from features.errors import StoreCorruptError
from features.status import Status
from features.storage.column import Column
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.stores.convert import convert_store
from pipeline.stores.inspect import ALIKE, column_statistics, describe_store
from tests.commands import sail, the_error_of
from tests.feature_stores import IMAGE, TEXT, make_store, on_disk

EYE = f"image/{IMAGE}"
BAD = (0, 17, 99)


def rewritten(column: Column, features: np.ndarray) -> None:
    """Give the rows of a column other features."""
    size, status = column.rows_per_chunk, column.status()
    for chunk in range(column.num_chunks):
        part = slice(chunk * size, (chunk + 1) * size)
        column.write(chunk, features[part], status[part])


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "s.zarr", rows=100, bad_images=BAD)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_statistics_are_those_of_all_rows_that_are_ok(
    store: FeatureStore, tmp_path: Path, dtype: str
) -> None:
    if dtype == "int8":
        convert_store(store.path, tmp_path / "int8.zarr", dtype, StopRequest())
        store = FeatureStore.open(tmp_path / "int8.zarr")
    column = store.column(EYE)
    found = column_statistics(column, column.status(), 1000)
    assert found is not None
    expected = np.delete(column.read(0, 100).astype(np.float64), BAD, axis=0)
    norms = np.linalg.norm(expected, axis=1)
    assert found["rows"] == 97
    assert found["norms"] == {
        "min": pytest.approx(norms.min(), abs=1e-3),
        "mean": pytest.approx(norms.mean(), abs=1e-3),
        "median": pytest.approx(np.median(norms), abs=1e-3),
        "max": pytest.approx(norms.max(), abs=1e-3),
    }
    dimensions = found["dimensions"]
    np.testing.assert_allclose(dimensions["mean"], expected.mean(axis=0), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(dimensions["sd"], expected.std(axis=0), rtol=2e-3)
    variance = expected.var(axis=0)
    assert dimensions["largest_share"] == pytest.approx(variance.max() / variance.sum(), rel=1e-2)
    assert dimensions["constant"] == 0


def test_a_dimension_that_never_changes_is_counted(store: FeatureStore) -> None:
    column = store.column(EYE)
    features = column.read(0, 100)
    features[:, 3] = np.where(column.status() == Status.OK, 0.5, 0)
    rewritten(column, features)
    found = column_statistics(column, column.status(), 1000)
    assert found is not None
    assert found["dimensions"]["constant"] == 1


def test_near_duplicates_are_found_wherever_they_are(store: FeatureStore) -> None:
    column = store.column(EYE)
    features = column.read(0, 100)
    features[50:90] = features[1]  # 41 of 97 rows
    rewritten(column, features)
    found = column_statistics(column, column.status(), 1000)
    assert found is not None
    rows = np.delete(features.astype(np.float64), BAD, axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = ((rows @ rows.T >= ALIKE).sum(axis=0) > 1).mean()
    assert expected >= 41 / 97
    assert found["near_duplicates"] == {"queries": 97, "cosine": ALIKE, "fraction": expected}


def test_of_a_large_store_whole_chunks_evenly_spread_are_read(store: FeatureStore) -> None:
    column = store.column(EYE)  # 7 chunks of 16 rows
    for chunk in (1, 2, 4, 5):
        on_disk(column.features_file(chunk)).unlink()  # so reading them would be an error
    found = column_statistics(column, column.status(), 48)
    assert found is not None
    assert found["rows"] == 16 - 1 + 16 + 4 - 1
    expected = np.linalg.norm(
        np.concatenate([column.read(*part) for part in [(0, 16), (48, 64), (96, 100)]]).astype(
            np.float64
        ),
        axis=1,
    )
    assert found["norms"]["max"] == pytest.approx(expected.max(), abs=1e-3)


def test_where_no_row_is_ok_there_are_no_statistics(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=20, bad_images=tuple(range(20)))
    description = describe_store(store.path)
    assert description["columns"][EYE]["statistics"] is None
    assert description["columns"][EYE]["status"] == {"not an image": 20}
    assert "20 not an image" in sail("inspect", store.path).stdout


def test_chunks_that_are_not_done_are_pending_and_not_measured(store: FeatureStore) -> None:
    column = store.column(EYE)
    for file in (column.status_file(2), column.features_file(2)):
        on_disk(file).unlink()
    found = describe_store(store.path)["columns"][EYE]
    assert found["status"] == {"pending": 16, "ok": 81, "not an image": 3}
    assert found["statistics"]["rows"] == 81


def test_damaged_features_are_told_in_one_line(store: FeatureStore) -> None:
    file = on_disk(store.column(EYE).features_file(2))
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(StoreCorruptError, match=r"image/eye/features/c/2/0 is damaged"):
        describe_store(store.path)
    assert "is damaged" in the_error_of(sail("inspect", store.path, expect=1))


def test_the_table_and_json_say_what_the_store_holds(store: FeatureStore) -> None:
    shown = sail("inspect", store.path).stdout
    found = json.loads(sail("inspect", store.path, "--json").stdout)
    alike = found["columns"][EYE]["statistics"]["near_duplicates"]["fraction"]
    for words in (
        "100 rows in chunks of 16",
        "100 × 8 float16",
        "3 not an image",
        f"{alike:.1%} of 97, cosine ≥ 0.99",
        "shard/000049",
        "long: long of 49",
    ):
        assert words in " ".join(shown.split()), words
    column = found["columns"][f"text/{TEXT}/long"]
    assert column["fingerprint"] == store.column(f"text/{TEXT}/long").fingerprint
    assert len(column["statistics"]["dimensions"]["sd"]) == column["shape"][1]
    assert [row["key"] for row in found["samples"]] == [
        "shard/000000",
        "shard/000049",
        "shard/000099",
    ]
    assert found == describe_store(store.path)
    few = json.loads(sail("inspect", store.path, "--rows", "16", "--json").stdout)
    assert few["columns"][f"text/{TEXT}/long"]["statistics"]["rows"] == 16


def test_words_in_brackets_and_between_colons_are_shown_as_they_are(tmp_path: Path) -> None:
    words = "a [/b] sign :heart: [red]"
    captions = {"bare": [words] * 20, "long": [words] * 20}
    store = make_store(tmp_path / "s [/x].zarr", rows=20, captions=captions)
    for arguments in ((), ("--row", 3)):
        shown = sail("inspect", store.path, *arguments).stdout
        assert words in shown
