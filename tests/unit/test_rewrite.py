"""Stores made of stores hold the rows that were asked for, with the bytes they had."""

import hashlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from align.columns import check_same_rows
from features.errors import ConfigError, SourceError, StoreError
from features.status import Status
from features.storage.place import Place
from features.store import FeatureStore, store_key_hashes
from pipeline.interrupt import StopRequest
from pipeline.stores.convert import convert_store
from pipeline.stores.merge import merge_stores, rechunk_store, reorder_store
from pipeline.stores.subset import Choice, subset_store
from pipeline.stores.verify import verify_store
from tests.commands import sail, the_error_of
from tests.feature_stores import IMAGE, TEXT, as_version_1, make_store, on_disk

GO_ON = StopRequest()
EYE = f"image/{IMAGE}"


def numbered(
    store: FeatureStore, name: str, values: Sequence[int], class_names: list[str] | None = None
) -> None:
    """Give a store labels or groups; call `FeatureStore.open` again."""
    group = zarr.open_group(on_disk(store.path), mode="r+")
    array = group.create_array(
        name, shape=(store.rows,), chunks=(store.rows_per_chunk,), dtype="int32", fill_value=-1
    )
    array[:] = np.array(values, dtype=np.int32)
    if class_names:
        array.attrs["class_names"] = class_names
    as_version_1(on_disk(store.path))


def rekeyed(path: Path, **options: int) -> FeatureStore:
    """Make a store whose keys are not those of the others, with the same encoders."""
    store = make_store(path, **options)  # type: ignore[arg-type]
    keys = [f"other/{row}" for row in range(store.rows)]
    group = zarr.open_group(path, mode="r+")
    group["key"][:] = np.array(keys, dtype=np.dtypes.StringDType())  # type: ignore[index]
    digest = hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
    group.attrs["keys_sha256"] = digest
    as_version_1(path)
    return FeatureStore.open(path)


def everything(place: Place) -> dict[str, list[object]]:
    """Return all values of a store by row."""
    store = FeatureStore.open(place)
    values: dict[str, list[object]] = {"key": store.keys().tolist()}
    for field in store.fields:
        values[field] = store.captions(field).tolist()
    for name in store.columns():
        column = store.column(name)
        values[name] = column.read(0, store.rows).tolist()
        values[f"{name}/status"] = column.status().tolist()
    return values


def files_of(place: Place) -> dict[str, bytes]:
    folder = on_disk(place)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "zarr.json"
    }


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "s.zarr", rows=100, bad_images=(0, 17), bad_captions=((3, 0),))


def test_a_store_cut_in_other_chunks_and_back_has_the_same_bytes(
    store: FeatureStore, tmp_path: Path
) -> None:
    finer = rechunk_store(store.path, tmp_path / "finer.zarr", 7, GO_ON)
    assert FeatureStore.open(finer).num_chunks == 15
    assert everything(finer) == everything(store.path)
    assert verify_store(finer) == []
    back = rechunk_store(finer, tmp_path / "back.zarr", store.rows_per_chunk, GO_ON)
    assert files_of(back) == files_of(store.path)
    assert FeatureStore.open(back).attributes == store.attributes


def test_features_in_8_bits_are_not_rounded_again(store: FeatureStore, tmp_path: Path) -> None:
    small = tmp_path / "int8.zarr"
    convert_store(store.path, small, "int8", GO_ON)
    finer = rechunk_store(small, tmp_path / "finer.zarr", 7, GO_ON)
    back = rechunk_store(finer, tmp_path / "back.zarr", store.rows_per_chunk, GO_ON)
    assert files_of(back) == files_of(small)
    assert FeatureStore.open(back).column(EYE).is_scaled


def test_merged_rows_stand_behind_each_other(store: FeatureStore, tmp_path: Path) -> None:
    other = rekeyed(tmp_path / "o.zarr", rows=33, rows_per_chunk=5, seed=1)
    both = merge_stores([store.path, other.path], tmp_path / "both.zarr", GO_ON)
    first, second, found = everything(store.path), everything(other.path), everything(both)
    assert found == {name: values + second[name] for name, values in first.items()}
    assert verify_store(both) == []
    merged = FeatureStore.open(both)
    assert [each["rows"] for each in merged.source["stores"]] == [100, 33]
    assert merged.column(EYE).fingerprint == store.column(EYE).fingerprint


def test_groups_of_merged_stores_are_not_mixed_up_and_labels_may_miss(
    store: FeatureStore, tmp_path: Path
) -> None:
    other = rekeyed(tmp_path / "o.zarr", rows=4)
    numbered(store, "group", [row // 2 - 1 for row in range(100)])  # -1 to 48
    numbered(other, "group", [0, 0, 1, -1])
    numbered(other, "label", [1, 0, 1, 0], class_names=["cat", "dog"])
    both = merge_stores([store.path, other.path], tmp_path / "both.zarr", GO_ON)
    merged = FeatureStore.open(both)
    groups, labels = merged.groups(), merged.labels()
    assert groups is not None
    assert labels is not None
    assert groups[98:].tolist() == [48, 48, 49, 49, 50, -1]
    assert labels[98:].tolist() == [-1, -1, 1, 0, 1, 0]
    assert merged.class_names == ("cat", "dog")


def test_equal_keys_are_refused_unless_stores_are_named_in_them(
    store: FeatureStore, tmp_path: Path
) -> None:
    other = make_store(tmp_path / "o.zarr", rows=10)
    out = tmp_path / "both.zarr"
    twice = r"10 keys come twice .*, such as 'shard/000000' in row 0 of .*/o\.zarr.*--prefix"
    with pytest.raises(SourceError, match=twice):
        merge_stores([store.path, other.path], out, GO_ON)
    assert not out.exists()
    assert sail("merge", store.path, other.path, "--prefix", "--out", out).stdout == f"{out}\n"
    assert FeatureStore.open(out).keys(99, 101).tolist() == ["s/shard/000099", "o/shard/000000"]


def test_stores_that_differ_are_refused_and_what_differs_is_named(
    store: FeatureStore, tmp_path: Path
) -> None:
    for name, options, message in [
        ("a", {"fields": ("bare",)}, r"caption fields = \('bare',\)"),
        ("b", {"image_dim": 9}, r"columns = .*'image/eye': 9"),
    ]:
        other = make_store(tmp_path / f"{name}.zarr", rows=10, **options)  # type: ignore[arg-type]
        with pytest.raises(StoreError, match=f"{name}.zarr has {message}.* were expected"):
            merge_stores([store.path, other.path], tmp_path / "both.zarr", GO_ON)
    other = make_store(tmp_path / "c.zarr", rows=10)
    zarr.open_group(tmp_path / "c.zarr" / EYE, mode="r+").attrs["pooling"] = "cls"
    as_version_1(tmp_path / "c.zarr")
    with pytest.raises(StoreError, match=r"c.zarr has image/eye: pooling = 'cls'.* has None"):
        merge_stores([store.path, other.path], tmp_path / "both.zarr", GO_ON)


def rows_of(store: FeatureStore, tmp_path: Path, choice: Choice) -> list[int]:
    """Choose rows, see that they are those of the store, and return their numbers."""
    place = subset_store(store.path, tmp_path / "part.zarr", choice, GO_ON)
    every, found = everything(store.path), everything(place)
    rows = [every["key"].index(key) for key in found["key"]]
    assert found == {name: [values[row] for row in rows] for name, values in every.items()}
    assert verify_store(place) == []
    return rows


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (("caption/long=long of 7",), [7]),
        (("caption/long~OF 9", "key~9"), [9, *range(90, 100)]),
        ((f"{EYE}=not an image",), [0, 17]),
        (("label=dog",), list(range(1, 100, 2))),
        (("label=1", "key~shard/00000"), [1, 3, 5, 7, 9]),
    ],
)
def test_a_query_finds_its_rows(
    store: FeatureStore, tmp_path: Path, queries: tuple[str, ...], expected: list[int]
) -> None:
    numbered(store, "label", [row % 2 for row in range(100)], class_names=["cat", "dog"])
    store = FeatureStore.open(store.path)
    assert rows_of(store, tmp_path, Choice(queries=queries)) == expected
    assert FeatureStore.open(tmp_path / "part.zarr").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("dog", "it has neither = nor ~"),
        ("label=dog", "it has no 'label'"),
        (f"{EYE}=fine", r"'fine' is no status \(pending, ok"),
        (f"{EYE}~ok", "'image/eye' is no text"),
        ("caption/other=x", "it has no 'caption/other'"),
    ],
)
def test_a_query_that_cannot_be_asked_is_refused(
    store: FeatureStore, tmp_path: Path, query: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*was expected, where NAME is one of key"):
        subset_store(store.path, tmp_path / "part.zarr", Choice(queries=(query,)), GO_ON)


def test_keys_of_a_file_are_taken_in_the_order_of_the_store_and_must_be_there(
    store: FeatureStore, tmp_path: Path
) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("shard/000060\nshard/000003\n\n")
    assert rows_of(store, tmp_path, Choice(keys=file)) == [3, 60]
    file.write_text("shard/000060\nnone\nnor this\n")
    with pytest.raises(SourceError, match="no row with the key 'none', and 1 more"):
        subset_store(store.path, tmp_path / "other.zarr", Choice(keys=file), GO_ON)


def test_random_rows_are_the_same_for_a_seed_and_others_for_another(
    store: FeatureStore, tmp_path: Path
) -> None:
    drawn = [
        FeatureStore.open(
            subset_store(store.path, tmp_path / f"{i}.zarr", Choice(random=20, seed=seed), GO_ON)
        ).keys()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert len(set(drawn[0].tolist())) == 20
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()
    assert sorted(drawn[2].tolist()) == drawn[2].tolist()


def greedy(features: np.ndarray, cosine: float) -> list[int]:
    """Say which rows stay, by the definition."""
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    stay = list[int]()
    for row, direction in enumerate(directions):
        if all(direction @ directions[other] < cosine for other in stay):
            stay.append(row)
    return stay


@pytest.mark.parametrize("rows_per_chunk", [5, 16, 100])
def test_of_rows_that_are_alike_the_first_stays_whatever_the_chunks(
    tmp_path: Path, rows_per_chunk: int
) -> None:
    store = make_store(tmp_path / "s.zarr", rows=100, rows_per_chunk=rows_per_chunk)
    features = store.column(EYE).read(0, 100).astype(np.float64)
    expected = greedy(features, 0.8)
    assert 10 < len(expected) < 70
    assert rows_of(store, tmp_path, Choice(deduplicate=0.8)) == expected


def test_rows_that_are_quarantined_are_no_duplicates_of_each_other(
    store: FeatureStore, tmp_path: Path
) -> None:
    rows = rows_of(store, tmp_path, Choice(deduplicate=0.0, column=EYE))
    status = store.column(EYE).status()
    assert {0, 17} <= set(rows)
    assert status[1] == Status.OK
    assert 1 in rows


def test_choices_narrow_each_other_and_are_written_down(
    store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "part.zarr"
    sail(
        *("subset", store.path, "--out", out, "--query", "key~shard/00001"),
        *("--query", f"{EYE}=ok", "--random", "4", "--seed", "3"),
    )
    part = FeatureStore.open(out)
    assert part.rows == 4
    assert all(key.startswith("shard/00001") for key in part.keys().tolist())
    assert part.source["chosen"]["queries"] == ["key~shard/00001", f"{EYE}=ok"]
    assert part.source["chosen"]["seed"] == 3
    assert part.source["of"]["keys_sha256"] == store.keys_sha256


def test_nothing_is_written_over(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    for arguments in [
        ("merge", store.path, "--out", store.path),
        ("subset", store.path, "--random", 3, "--out", store.path),
        ("rechunk", store.path, "--rows-per-chunk", 7, "--out", store.path),
    ]:
        assert "There is something at" in the_error_of(sail(*arguments, expect=1))
    message = the_error_of(sail("subset", store.path, "--query", "key=x", "--out", out, expect=1))
    assert "None of the 100 rows" in message
    assert "Give --keys" in sail("subset", store.path, "--out", out, expect=2).stderr


def test_a_store_that_is_not_done_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    on_disk(store.column(f"text/{TEXT}/long").status_file(3)).unlink()
    with pytest.raises(StoreError, match=r"text/reader/long has 1 chunks that are not done"):
        rechunk_store(store.path, tmp_path / "out.zarr", 7, GO_ON)


def shuffled(path: Path, rows: int) -> FeatureStore:
    """Make a store of the rows of `s.zarr`, and more, whose keys stand in a random order."""
    make_store(path, rows=rows, bad_images=(0, 17), bad_captions=((3, 0),))
    order = np.random.default_rng(1).permutation(rows)
    keys = np.array([f"shard/{row:06d}" for row in order], dtype=np.dtypes.StringDType())
    zarr.open_group(path, mode="r+")["key"][:] = keys  # type: ignore[index]
    as_version_1(path)
    return FeatureStore.open(path)


@pytest.mark.parametrize("memory_mb", [1, 1000])
@pytest.mark.parametrize("rows_per_chunk", [7, 16, 50])
def test_rows_are_put_in_the_order_of_another_store_by_their_keys(
    tmp_path: Path, rows_per_chunk: int, memory_mb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memory_mb == 1:
        monkeypatch.setattr("features.storage.column.Column.row_bytes", 1 << 20)  # a row at once
    like = make_store(tmp_path / "like.zarr", rows=100, rows_per_chunk=rows_per_chunk)
    texts = shuffled(tmp_path / "texts.zarr", rows=120)
    out = reorder_store(texts.path, tmp_path / "out.zarr", like.path, GO_ON, memory_mb=memory_mb)
    assert verify_store(out) == []
    made = FeatureStore.open(out)
    check_same_rows(like, made)
    before, after = everything(texts.path), everything(out)
    place = {key: row for row, key in enumerate(before["key"])}
    for name, values in after.items():
        assert values == [before[name][place[key]] for key in like.keys().tolist()], name
    assert made.source["of"]["keys_sha256"] == texts.keys_sha256


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    like, texts = make_store(tmp_path / "like.zarr"), make_store(tmp_path / "texts.zarr", rows=150)
    arguments = ("reorder", texts.path, "--like", like.path, "--out", tmp_path / "out.zarr")
    message = the_error_of(sail(*arguments, expect=1))
    assert "has no row with the key 'shard/000150' of row 150" in message
    assert "and lacks 49 more" in message
    assert not (tmp_path / "out.zarr").exists()


def test_every_store_has_the_hashes_of_its_keys_for_anything_that_reads_zarr(
    store: FeatureStore, tmp_path: Path
) -> None:
    some, both = tmp_path / "some.zarr", tmp_path / "both.zarr"
    sail("subset", store.path, "--random", 33, "--out", some)
    sail("merge", some, store.path, "--prefix", "--out", both)
    for path in (tmp_path / "s.zarr", some, both):
        group: Any = zarr.open_group(path, mode="r")
        digests = [blake2b(key.encode(), digest_size=8).digest() for key in group["key"][:]]
        expected = np.array([int.from_bytes(each, "little") for each in digests], np.uint64)
        np.testing.assert_array_equal(group["key_hash"][:], expected)
        np.testing.assert_array_equal(store_key_hashes(FeatureStore.open(path)), expected)
    as_version_1(both)
    np.testing.assert_array_equal(store_key_hashes(FeatureStore.open(both)), expected)
