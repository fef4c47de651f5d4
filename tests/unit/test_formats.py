"""Stores in other forms: what comes back is byte-identical, what does not fit is refused."""

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.lib import format as npy
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from features.errors import ConfigError, SourceError, StoreError
from features.status import Status
from features.store import FeatureStore
from pipeline.cli.stores import WRITTEN
from pipeline.interrupt import StopRequest
from pipeline.stores import FORMATS, clip_retrieval
from pipeline.stores.convert import Wanted, export_store, import_store
from pipeline.stores.parquet import ParquetArrays
from pipeline.stores.verify import verify_store
from pipeline.stores.writer import StoreRows
from tests.commands import sail, the_error_of
from tests.feature_stores import IMAGE, make_store, on_disk

GO_ON = StopRequest()
ROWS, DIM = 40, 6


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "s.zarr", rows=100, bad_images=(0, 17), bad_captions=((3, 0),))


def chunks_of(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name != "zarr.json"
    }


def vectors(seed: int, rows: int = ROWS, dtype: Any = np.float16) -> np.ndarray:
    values: np.ndarray = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(dtype)
    return values


@pytest.mark.parametrize("form", WRITTEN)
def test_a_store_comes_back_byte_identical(store: FeatureStore, tmp_path: Path, form: str) -> None:
    out, copy = tmp_path / f"out.{form}", tmp_path / "copy.zarr"
    assert sail("convert", store.path, "--to", form, "--out", out).stdout == f"{out}\n"
    assert sail("import-store", out, "--from", form, "--out", copy).stdout == f"{copy}\n"
    assert chunks_of(copy) == chunks_of(on_disk(store.path))
    again = FeatureStore.open(copy)
    assert again.attributes == store.attributes
    for name in store.columns():
        assert again.column(name).fingerprint == store.column(name).fingerprint
    assert verify_store(copy) == verify_store(store.path)


def test_damaged_features_are_not_carried_over(store: FeatureStore, tmp_path: Path) -> None:
    file = on_disk(store.column(f"image/{IMAGE}").features_file(2))
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(StoreError, match=r"image/eye/features/c/2/0 is damaged"):
        export_store(store.path, "parquet", tmp_path / "out.parquet", GO_ON)


def test_clip_retrieval_finds_its_files_and_any_number_of_rows_in_each(
    store: FeatureStore, tmp_path: Path
) -> None:
    folder = clip_retrieval.write(StoreRows(store), tmp_path / "out", GO_ON, rows_per_file=40)
    parts = sorted(path.name for path in (folder / "img_emb").iterdir())
    assert parts == ["img_emb_0.npy", "img_emb_1.npy", "img_emb_2.npy", "img_emb_3.npy"]
    loaded = [np.load(folder / "img_emb" / name, allow_pickle=False) for name in parts]
    expected = store.column(f"image/{IMAGE}").read(0, 100)
    np.testing.assert_array_equal(np.concatenate(loaded), expected)
    table = pq.read_table(folder / "metadata" / "metadata_1.parquet")
    assert table.num_rows == len(loaded[1]) == 32
    assert table.column("image_path").to_pylist() == store.keys(32, 64).tolist()
    assert table.column("caption").to_pylist() == store.captions(store.fields[0], 32, 64).tolist()
    copy = import_store(folder, tmp_path / "copy.zarr", Wanted(), GO_ON)
    assert chunks_of(Path(str(copy))) == chunks_of(on_disk(store.path))


def write_npy(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return folder


def write_npz(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    np.savez_compressed(folder / "f.npz", **arrays)  # type: ignore[arg-type]
    return folder / "f.npz"


def write_hdf5(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    import h5py

    folder.mkdir()
    with h5py.File(folder / "f.h5", "w") as file:
        for name, values in arrays.items():
            file[f"deep/{name}"] = values
    return folder / "f.h5"


def write_safetensors(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(arrays, folder / "f.safetensors")
    return folder / "f.safetensors"


def write_parquet(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    lists = pa.list_(pa.float32())
    columns = {name: pa.array(list(values), lists) for name, values in arrays.items()}
    pq.write_table(pa.table(columns), folder / "f.parquet", row_group_size=7)
    return folder / "f.parquet"


def write_released(folder: Path, arrays: dict[str, np.ndarray], size: int = 16) -> Path:
    for name, values in arrays.items():
        part = folder / f"{name}_embedding" / "model" / f"cc3m_{name}"
        part.mkdir(parents=True)
        for number, start in enumerate(range(0, len(values), size)):
            rows = torch.from_numpy(values[start : start + size].copy())
            torch.save(rows, part / f"{number}.pt")
    return folder


OTHERS = {
    "npy": (write_npy, "{}.npy"),
    "npz": (write_npz, "{}"),
    "hdf5": (write_hdf5, "deep/{}"),
    "safetensors": (write_safetensors, "{}"),
    "parquet": (write_parquet, "{}"),
    "sail-pt": (write_released, "{0}_embedding/model/cc3m_{0}"),
}


@pytest.mark.parametrize("form", OTHERS)
def test_features_of_another_program_arrive_bit_for_bit_in_chunks(
    tmp_path: Path, form: str
) -> None:
    write, name = OTHERS[form]
    image, text = vectors(0), vectors(1)
    path = write(tmp_path / "in", {"image": image, "text": text})
    taken = {"image/a": name.format("image"), "text/b/c": name.format("text")}
    wanted = Wanted(taken={**dict.fromkeys(("image/model", "text/model/cc3m_text"), ""), **taken})
    wanted = Wanted(taken=wanted.taken, rows_per_chunk=16)
    store = FeatureStore.open(import_store(path, tmp_path / "s.zarr", wanted, GO_ON))
    np.testing.assert_array_equal(store.column("image/a").read(0, ROWS), image)
    np.testing.assert_array_equal(store.column("text/b/c").read(0, ROWS), text)
    assert store.num_chunks == 3
    assert store.keys()[7] == f"{path.stem}/000000007"
    assert verify_store(store.path) == []
    assert store.source["kind"] == form
    assert len(store.source["sha256"]) == 64


def test_every_form_is_tried_here() -> None:
    assert set(OTHERS) | set(WRITTEN) == set(FORMATS)


def test_the_table_of_the_page_has_every_form_and_says_which_are_written() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| (yes)? ?\| yes \|", page, re.MULTILINE)
    told = {name: bool(written) for names, written in rows for name in re.findall("`(.+?)`", names)}
    assert told == {name: bool(each.ending) for name, each in FORMATS.items()}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_captions_keys_and_labels_come_from_a_table_beside(tmp_path: Path, separator: str) -> None:
    path = write_npy(tmp_path / "in", {"image": vectors(0)})
    (tmp_path / "t.csv").write_text(
        separator.join(("name", "words", "class\n"))
        + "".join(separator.join((f"k{i}", f"a {i}", f"{i % 3}\n")) for i in range(ROWS))
    )
    sail(
        *("import-store", path, "--out", tmp_path / "s.zarr", "--table", tmp_path / "t.csv"),
        *("--take", "image/a=image.npy", "--take", "key=table/name", "--take", "label=table/class"),
        *("--take", "caption/raw=table/words", "--about", "image/a.model=owner/name"),
    )
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.keys(5, 7).tolist() == ["k5", "k6"]
    assert store.captions("raw", 5, 7).tolist() == ["a 5", "a 6"]
    labels = store.labels()
    assert labels is not None
    assert labels[:4].tolist() == [0, 1, 2, 0]
    assert store.column("image/a").fingerprint["model"] == "owner/name"


def test_what_float16_cannot_hold_and_what_is_empty_is_quarantined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = vectors(0, dtype=np.float32)
    features[3, 2], features[4], features[5, 0] = 1e6, 0, np.nan
    path = write_npy(tmp_path / "in", {"image": features})
    wanted = Wanted(taken={"image/a": "image.npy"})
    store = FeatureStore.open(import_store(path, tmp_path / "s.zarr", wanted, GO_ON))
    status = store.column("image/a").status()
    assert status[2:7].tolist() == [
        Status.OK,
        Status.NOT_FINITE,
        Status.MISSING_IMAGE,
        Status.NOT_FINITE,
        Status.OK,
    ]
    assert "image/a: 3 rows quarantined" in caplog.text
    assert verify_store(store.path) == []


def released(folder: Path, **arrays: np.ndarray) -> Path:
    return write_released(folder, arrays)


def drop_a_row(folder: Path, name: str) -> None:
    rows = torch.load(folder / name, weights_only=True)
    torch.save(rows[:-1], folder / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.pt", r"text is not aligned from row 15 on: 1\.pt has 16 rows, 0\.pt has 15"),
        ("1.pt", r"text is not aligned from row 31 on: 1\.pt has 15 rows, 0\.pt has 16"),
        ("2.pt", r"cc3m_text' has 39 rows, .*cc3m_image' has 40: row 39 is in one of them only"),
    ],
)
def test_a_released_folder_that_lost_a_row_is_refused_and_the_row_named(
    tmp_path: Path, name: str, message: str
) -> None:
    path = released(tmp_path / "in", image=vectors(0), text=vectors(1))
    drop_a_row(path / "text_embedding/model/cc3m_text", name)
    with pytest.raises(SourceError, match=message):
        import_store(path, tmp_path / "s.zarr", Wanted(), GO_ON)
    assert not (tmp_path / "s.zarr").exists()


def test_a_released_folder_that_lost_a_file_is_refused(tmp_path: Path) -> None:
    path = released(tmp_path / "in", image=vectors(0), text=vectors(1))
    (path / "image_embedding/model/cc3m_image/1.pt").unlink()
    message = r"not aligned from row 16 on: 1\.pt is missing\. .*expected.*Encode this folder again"
    assert message.split(r"\.")[0].replace("\\", "") in the_error_of(
        sail("import-store", path, "--out", tmp_path / "s.zarr", expect=1)
    )
    with pytest.raises(SourceError, match=message):
        import_store(path, tmp_path / "s.zarr", Wanted(), GO_ON)


def test_a_released_folder_is_taken_by_its_own_names(tmp_path: Path) -> None:
    path = released(tmp_path / "in", image=vectors(0), text=vectors(1))
    store = FeatureStore.open(import_store(path, tmp_path / "s.zarr", Wanted(), GO_ON))
    assert store.columns() == ["image/model", "text/model/cc3m_text"]


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("attacked"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    folder = Path("image_embedding/m/d")
    folder.mkdir(parents=True)
    torch.save(Attack(), folder / "0.pt")
    for path in ("a.npy", "image_embedding"):
        with pytest.raises(SourceError, match="cannot be read"):
            import_store(Path(path), tmp_path / "s.zarr", Wanted(), GO_ON)
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ({}, r"No features are taken\. .*\n  image\.npy \(40, 6\)\n  number\.npy \(40,\)"),
        ({"image/a": "none.npy"}, r"no array 'none\.npy' for 'image/a'"),
        ({"image/../a": "image.npy"}, r"No features are taken"),
        ({"image/a": "image.npy", "picture": "image.npy"}, r"'picture' is no name of a store"),
        ({"image/a": "number.npy"}, r"'number\.npy' has shape \(40,\), which cannot be 'image/a'"),
        ({"image/a": "image.npy", "label": "image.npy"}, r"has shape \(40, 6\), which cannot be"),
        ({"image/a": "short.npy", "image/b": "image.npy"}, r"row 39 is in one of them only"),
        ({"image/a": "image.npy", "key": "same.npy"}, r"rows 0 and 1 both have the key '1'"),
        ({"image/a": "whole.npy"}, r"'whole\.npy' holds int64, which cannot be 'image/a'"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, taken: dict[str, str], message: str
) -> None:
    arrays = {
        "image": vectors(0),
        "number": np.arange(ROWS),
        "same": np.ones(ROWS, dtype=np.int64),
        "short": vectors(1)[:-1],
        "whole": np.ones((ROWS, DIM), dtype=np.int64),
    }
    path = write_npy(tmp_path / "in", arrays)
    with pytest.raises((ConfigError, SourceError), match=message):
        import_store(path, tmp_path / "s.zarr", Wanted(taken=taken), GO_ON)
    assert not (tmp_path / "s.zarr").exists()


def test_a_vector_of_another_length_in_parquet_is_refused_and_its_row_named(
    tmp_path: Path,
) -> None:
    rows = [[1.0, 2.0], None, [1.0, 2.0], [1.0]]
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"v": rows}), path)
    wanted = Wanted(taken={"image/a": "v"})
    with pytest.raises(SourceError, match="v of row 3 has 1 values, not 2"):
        import_store(path, tmp_path / "s.zarr", wanted, GO_ON)
    pq.write_table(pa.table({"v": rows[:3]}), path)
    store = FeatureStore.open(import_store(path, tmp_path / "s.zarr", wanted, GO_ON))
    assert store.column("image/a").status().tolist() == [1, Status.MISSING_IMAGE, 1]


def test_what_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    for name in ("none.h5", "none"):
        message = the_error_of(sail("import-store", tmp_path / name, "--out", "x", expect=1))
        assert f"There is nothing at {tmp_path / name}" in message


def test_a_row_group_of_parquet_is_not_read_as_a_whole(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((49_152, 256), dtype=np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 256)
    pq.write_table(pa.table({"v": lists}), tmp_path / "f.parquet", row_group_size=len(values))
    before = pa.total_allocated_bytes()
    with ParquetArrays(tmp_path / "f.parquet") as arrays:
        found = arrays.read("v", 0, 100)
        assert pa.total_allocated_bytes() - before < values.nbytes / 2
    np.testing.assert_array_equal(found, values[:100])


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "in", {"image": vectors(0)}) / "image.npy"
    path.write_bytes(path.read_bytes()[:-5])
    wanted = Wanted(taken={"image/a": "image.npy"})
    with pytest.raises(SourceError, match="takes 480 bytes, and it has 475"):
        import_store(path, tmp_path / "s.zarr", wanted, GO_ON)


def test_clip_retrieval_files_of_other_rows_are_refused(
    store: FeatureStore, tmp_path: Path
) -> None:
    folder = export_store(store.path, "clip-retrieval", tmp_path / "out", GO_ON)
    np.save(folder / "text_emb" / "text_emb_0.npy", vectors(0, 99))
    with pytest.raises(SourceError, match=r"text_emb_0\.npy .*\(99, 6\) .* 100 rows, from row 99"):
        import_store(folder, tmp_path / "copy.zarr", Wanted(), GO_ON)


def test_the_same_files_have_the_same_fingerprint_and_others_another(tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        path = write_npy(tmp_path / f"in{number}", {"image": vectors(seed)})
        wanted = Wanted(taken={"image/a": "image.npy"})
        store = FeatureStore.open(import_store(path, tmp_path / f"{number}.zarr", wanted, GO_ON))
        found.append(store.source["sha256"])
    assert found[0] == found[1] != found[2]
    content = hashlib.sha256((tmp_path / "in0" / "image.npy").read_bytes()).hexdigest()
    assert found[0] == hashlib.sha256(f"{content}  image.npy\n".encode()).hexdigest()


def sparse_hdf5(folder: Path) -> Path:
    with h5py.File(folder / "f.h5", "w") as file:
        file.create_dataset("v", (10**12, 512), np.float16, chunks=(64, 512))
        file.create_dataset("small", (10**12, 2), np.float16, chunks=(1 << 20, 2))
    return folder / "f.h5"


def long_npy(folder: Path) -> Path:
    with (folder / "v.npy").open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (10**11, 512)}
        npy.write_array_header_1_0(file, header)
    return folder / "v.npy"


def long_npz(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "f.npz", "w") as archive:
        archive.writestr("v.npy", long_npy(folder).read_bytes())
    return folder / "f.npz"


def strides_of_0(folder: Path) -> Path:
    place = folder / "image_embedding" / "m" / "d"
    place.mkdir(parents=True)
    torch.save(torch.zeros(1, 1).expand(10**9, 512), place / "0.pt")
    return folder


@pytest.mark.parametrize(
    ("make", "taken"),
    [(sparse_hdf5, "v"), (long_npy, "v.npy"), (long_npz, "v"), (strides_of_0, None)],
)
def test_arrays_that_declare_more_than_there_is_are_refused_before_anything_is_made(
    make: Callable[[Path], Path], taken: str | None, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    path, before = make(tmp_path / "in"), set(tmp_path.iterdir())
    wanted = Wanted(taken={"image/a": taken} if taken else {})
    with pytest.raises(SourceError, match=r"cannot be read: .*shape"):
        import_store(path, tmp_path / "s.zarr", wanted, GO_ON)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("form", [".h5", ".npy", ".npz", ".parquet", ".safetensors", ".pt"])
@pytest.mark.parametrize("kind", ["fifo", "noise", "empty"])
def test_what_is_no_file_of_a_form_is_refused_in_one_line(
    form: str, kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / f"0{form}"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(bytes(range(256)) * 20 if kind == "noise" else b"")
    given = folder if form == ".pt" else path
    name = next(name for name, each in FORMATS.items() if form in each.suffixes)
    arguments = ("import-store", given, "--from", name, "--out", tmp_path / "s.zarr")
    message = the_error_of(sail(*arguments, "--take", "image/a=a", expect=1))
    assert "cannot be read" in message
    assert not (tmp_path / "s.zarr").exists()


def test_tensors_that_numpy_has_no_type_for_are_taken(tmp_path: Path) -> None:
    values = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    for name in ("bfloat16", "float8_e4m3fn"):
        typed = values.to(getattr(torch, name))
        path = tmp_path / f"{name}.safetensors"
        save_torch_file({"v": typed, "scale": torch.tensor(1.0)}, path)
        wanted = Wanted(taken={"image/a": "v"})
        store = FeatureStore.open(import_store(path, tmp_path / f"{name}.zarr", wanted, GO_ON))
        expected = typed.float().half().numpy()
        np.testing.assert_array_equal(store.column("image/a").read(0, ROWS), expected)
        with pytest.raises(SourceError, match=r"'scale' has shape \(\)"):
            import_store(path, tmp_path / "x.zarr", Wanted(taken={"image/a": "scale"}), GO_ON)


def test_texts_of_other_programs_are_cut_at_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["short", "é" * (1 << 20), "x"]
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"v": [[1.0, 2.0]] * 3, "words": texts}), path)
    wanted = Wanted(taken={"image/a": "v", "caption/c": "words"})
    store = FeatureStore.open(import_store(path, tmp_path / "s.zarr", wanted, GO_ON))
    assert list(map(len, map(str, store.captions("c")))) == [5, 1 << 19, 1]
    assert f"1 texts over 1 MiB in words of {path} are cut there" in caplog.messages
