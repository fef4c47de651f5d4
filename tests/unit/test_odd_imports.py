"""Features of other programs as people have them: read, or refused in one line."""

from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import SourceError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.stores.convert import Wanted, import_store
from pipeline.stores.merge import merge_stores
from tests.feature_stores import make_store

GO_ON = StopRequest()


def clip_retrieval(folder: Path, parts: list[str], dim: int = 4) -> Path:
    """A folder as `clip-retrieval inference` writes it, of three rows in each part."""
    random = np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for part in parts:
        for name in ("img_emb", "text_emb"):
            np.save(folder / name / f"{name}_{part}.npy", random.random((3, dim), np.float32))
        names = [f"{part}{row}" for row in range(3)]
        table = pa.table({"image_path": names, "caption": names})
        pq.write_table(table, folder / "metadata" / f"metadata_{part}.parquet")
    return folder


def imported(folder: Path) -> FeatureStore:
    wanted = Wanted(form="clip-retrieval")
    return FeatureStore.open(import_store(folder, folder.with_suffix(".zarr"), wanted, GO_ON))


def test_a_gap_in_the_numbers_of_parts_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = clip_retrieval(tmp_path / "e", ["00", "01", "03", "10"])
    assert imported(folder).rows == 12
    assert "a gap in the numbers of its parts: 2, 4, 5, 6, 7, 8, 9 missing (of 11)" in caplog.text


def test_parts_that_are_in_one_folder_only_are_refused(tmp_path: Path) -> None:
    folder = clip_retrieval(tmp_path / "e", ["0", "1", "2"])
    (folder / "img_emb" / "img_emb_1.npy").unlink()
    (folder / "metadata" / "metadata_2.parquet").unlink()
    with pytest.raises(SourceError, match=r"the parts \['1', '2'\] are in one of them only"):
        imported(folder)


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("name", ["text_emb", "img_emb"])
def test_one_kind_of_embeddings_may_be_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, is_there: bool
) -> None:
    folder = clip_retrieval(tmp_path / "e", ["0"])
    (folder / name / f"{name}_0.npy").unlink()
    if not is_there:
        (folder / name).rmdir()
    store = imported(folder)
    left = {"text_emb": "image/clip", "img_emb": "text/clip/caption"}[name]
    assert store.columns() == [left]
    assert store.captions("caption", 0, 3).tolist() == ["00", "01", "02"]
    assert f"there is nothing in {name}" in caplog.text


def test_parts_of_another_width_are_refused_by_name(tmp_path: Path) -> None:
    folder = clip_retrieval(tmp_path / "e", ["0", "1"])
    np.save(folder / "img_emb" / "img_emb_1.npy", np.ones((3, 5), np.float32))
    with pytest.raises(
        SourceError, match=r"img_emb_1\.npy .* shape \(3, 5\), img_emb_0\.npy \(3, 4"
    ):
        imported(folder)


def test_texts_of_hdf5_in_latin_1_are_refused_by_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = np.ones((2, 4), np.float32)
        file["texts"] = np.array(["grün".encode("latin-1")] * 2)
    wanted = Wanted(taken={"image/a": "image", "caption/raw": "texts"})
    with pytest.raises(SourceError, match=r"The texts /texts of .*b'gr\\xfcn' is not UTF-8"):
        import_store(tmp_path / "a.h5", tmp_path / "o.zarr", wanted, GO_ON)
    assert not (tmp_path / "o.zarr").exists()


def test_as_many_folders_are_put_before_keys_as_make_stores_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "runs" / name / "features" / "train.zarr" for name in ("cc3m", "cc12m")]
    for path in paths:
        path.parent.mkdir(parents=True)
        make_store(path, rows=10)
    both = FeatureStore.open(merge_stores(paths, tmp_path / "both.zarr", GO_ON, prefix=True))
    assert both.keys(9, 11).tolist() == [
        "cc3m/features/train/shard/000009",
        "cc12m/features/train/shard/000000",
    ]
