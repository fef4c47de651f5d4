"""What was trained, used: embeddings of new images and sentences, and search among the old ones."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

from evaluate.embedder import Embedder
from evaluate.hubness import NEIGHBOURS
from evaluate.results import read_items, read_results
from features.errors import EncoderError
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.python import load_aligned
from pipeline.run.align import align_run
from pipeline.run.aligned import Aligned
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny
from tests.commands import sail, the_error_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that was aligned."""
    run_file = tiny.world(tmp_path_factory.mktemp("world"), rows=48)
    config = load_config(str(run_file))
    extract(config, StopRequest())
    align_run(config, StopRequest())
    return config.run.dir


@pytest.fixture(scope="module")
def aligned(run: Path) -> Aligned:
    return load_aligned(run, device="cpu")


@pytest.fixture(scope="module")
def test_store(run: Path) -> FeatureStore:
    return FeatureStore.open(run / "features" / "test.zarr")


@pytest.fixture(scope="module")
def pictures(run: Path) -> list[bytes]:
    """The images of the test split, in the order of its rows."""
    (shard,) = run.parent.glob("shards/test*.tar")
    with tarfile.open(shard) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        return [_content(tar, member) for member in members]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def test_new_images_and_sentences_get_the_vectors_that_the_rows_of_a_store_get(
    aligned: Aligned, test_store: FeatureStore, pictures: list[bytes]
) -> None:
    embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
    stored = embedder.images(test_store).vectors.numpy()
    np.testing.assert_allclose(aligned.encode_image(pictures), stored, atol=2e-3)
    captions = [str(caption) for caption in test_store.captions("long")]
    stored = embedder.captions(test_store, "long").vectors.numpy()
    texts = aligned.encode_text(captions)
    np.testing.assert_allclose(texts, stored, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    cosines = aligned.similarity(aligned.encode_image(pictures[:2]), texts[:3])
    assert cosines.shape == (2, 3)
    alone = float(aligned.encode_image(pictures[1:2])[0] @ texts[2])
    assert cosines[1, 2] == pytest.approx(alone, abs=1e-6)


def test_the_example_of_the_readme_runs(
    run: Path, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from pipeline\.python .*?)```", page, re.DOTALL)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(pictures[0])
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code.replace("runs/demo", str(run)), scope)
    assert scope["cosines"].shape == (2, 2)
    np.testing.assert_allclose(scope["cosines"][0], scope["cosines"][1], atol=1e-6)


def test_pictures_in_memory_get_the_vectors_of_their_files(
    aligned: Aligned, pictures: list[bytes]
) -> None:
    opened = [tiny.reopened(Image.open(io.BytesIO(each))) for each in pictures[:3]]
    files = [tiny.encoded(each, "PNG") for each in opened]
    arrays = [np.asarray(each) for each in opened]
    expected = aligned.encode_image(files)
    np.testing.assert_array_equal(aligned.encode_image(opened), expected)
    np.testing.assert_array_equal(aligned.encode_image(arrays), expected)
    features = aligned.image_features(files)
    assert features.shape == (3, 16)
    np.testing.assert_allclose(aligned.embed_images(features), expected, atol=1e-6)
    cmyk = opened[0].convert("CMYK")
    np.testing.assert_array_equal(
        aligned.encode_image([cmyk]), aligned.encode_image([cmyk.convert("RGB")])
    )


def test_nothing_gives_no_vector(aligned: Aligned) -> None:
    assert aligned.encode_image([]).shape == (0, aligned.dim)
    assert aligned.encode_text([]).shape == (0, aligned.dim)


def test_an_image_finds_itself_and_a_caption_finds_its_words(
    run: Path, test_store: FeatureStore, pictures: list[bytes], tmp_path: Path
) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(pictures[5])
    found = json.loads(sail("search", run, "--image", photo, "--top", 3, "--json").stdout)
    assert [hit["rank"] for hit in found] == [1, 2, 3]
    assert found[0]["row"] == 5
    assert found[0]["key"] == str(test_store.keys()[5])
    assert found[0]["captions"]["long"] == str(test_store.captions("long")[5])
    words = str(test_store.captions("long")[3])
    found = json.loads(sail("search", run, words, "--among", "captions", "--json").stdout)
    assert found[0]["captions"] == {"long": words}
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert [hit["cosine"] for hit in found] == sorted(
        (hit["cosine"] for hit in found), reverse=True
    )
    assert words in " ".join(sail("search", run, words, "--among", "captions").stdout.split())


def test_a_score_against_hubness_is_reported_beside_the_cosine_and_ranks_a_search(
    run: Path, test_store: FeatureStore
) -> None:
    path = Path(
        sail(
            "eval", run, "--set", 'eval.retrieval_scores=["csls"]', "--set", "eval.bootstrap=0"
        ).stdout.splitlines()[-2]
    )
    found = [
        each
        for each in read_results(path)
        if each.dataset == "test/short" and each.task.startswith("retrieval/")
    ]
    by_score = {(each.protocol.get("score"), each.task, each.metric): each for each in found}
    assert len(by_score) == len(found) == 2 * 2 * 3
    first = by_score["csls", "retrieval/text_to_image", "recall@1"]
    assert first.protocol["bank"] == {"of": "training", "images": 48, "captions": 96}
    assert set(read_items(path.with_name("items.npz"))) >= {each.name for each in found}
    assert "Caption → image, csls" in path.with_name("report.html").read_text()

    words = str(test_store.captions("short")[0])
    query = ("search", run, words, "--top", test_store.rows, "--json")
    plain, ranked = (json.loads(sail(*query, *more).stdout) for more in ((), ("--score", "csls")))
    cosines = {hit["row"]: hit["cosine"] for hit in plain}
    for hit in ranked:
        assert hit["cosine"] == pytest.approx(cosines[hit["row"]], abs=1e-6)
    # By hand: cosines less half of the mean of those of the nearest captions of the training.
    aligned = load_aligned(run, device="cpu")
    embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
    train = FeatureStore.open(run / "features" / "train.zarr")
    bank = np.concatenate([embedder.captions(train, name).vectors for name in train.fields])
    images = embedder.images(test_store).vectors.numpy()
    offsets = np.sort(images @ bank.T, axis=1)[:, -NEIGHBOURS:].mean(axis=1) / 2
    scores = images @ aligned.encode_text([words])[0] - offsets
    in_order = scores[[hit["row"] for hit in ranked]]
    assert np.all(np.diff(in_order) < 2e-3)
    assert json.loads(sail(*query, "--score", "csls").stdout) == ranked


def test_a_score_is_refused_where_the_features_of_the_training_are_gone(
    run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "features" / "train.zarr")
    error = the_error_of(sail("search", copy, "a star", "--score", "csls", expect=1))
    assert "needs rows of the training as its bank, but there are none" in error
    assert len(json.loads(sail("search", copy, "a star", "--json").stdout))


def test_a_second_search_embeds_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sail("search", run, "a red circle", "--json").stdout

    def refuse(*_: object) -> None:
        raise AssertionError("rows were embedded again")

    monkeypatch.setattr(Embedder, "blocks", refuse)
    assert sail("search", run, "a red circle", "--json").stdout == first


def test_a_run_that_cannot_be_written_is_searched_by_what_lies_in_the_cache_of_the_user(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sail("search", run, "a word", "--json").stdout
    shutil.rmtree(run / "search")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda _path, mode: mode != os.W_OK)
    assert sail("search", run, "a word", "--json").stdout == expected
    assert not (run / "search").exists()
    assert len(list(tmp_path.rglob("*.npy"))) == 1


@pytest.mark.parametrize("form", ["npy", "parquet", "zarr"])
def test_embeddings_of_files_keep_their_order_and_an_unreadable_one_its_place(
    run: Path, aligned: Aligned, pictures: list[bytes], tmp_path: Path, form: str
) -> None:
    folder, out = tmp_path / "photos", tmp_path / f"photos.{form}"
    (folder / "more").mkdir(parents=True)
    for name, content in [("b.jpg", pictures[1]), ("a.jpg", b"no image"), ("c.txt", b"text")]:
        (folder / name).write_bytes(content)
    (folder / "more" / "d.png").write_bytes(pictures[2])
    (folder / "more" / "._d.png").write_bytes(b"left behind")
    result = sail("embed", run, "--images", folder, "--out", out, "--json")
    said = json.loads(result.stdout)
    assert said.pop("seconds").keys() == {"load", "decode", "encode", "write"}
    assert said == {"path": str(out), "items": 3, "unusable": 1}
    names, vectors = _read(out)
    assert names == [str(folder / name) for name in ("a.jpg", "b.jpg", "more/d.png")]
    assert np.isnan(vectors[0]).all()
    np.testing.assert_allclose(vectors[1:], aligned.encode_image(pictures[1:3]), atol=1e-5)
    sail("embed", run, "--images", folder / "more", "--out", out)  # replaces what was there
    assert len(_read(out)[1]) == 1
    assert not list(tmp_path.glob(".*"))


def _read(out: Path) -> tuple[list[str], np.ndarray]:
    if out.suffix == ".npy":
        return out.with_suffix(".names.txt").read_text().splitlines(), np.load(out)
    if out.suffix == ".parquet":
        table = pq.read_table(out)
        rows = table.column("embedding").to_pylist()
        width = table.schema.field("embedding").type.list_size
        return table.column("name").to_pylist(), np.array(
            [row or [np.nan] * width for row in rows], dtype=np.float32
        )
    group = zarr.open_group(out, mode="r")
    names, vectors = group["name"], group["embedding"]
    assert isinstance(names, zarr.Array)
    assert isinstance(vectors, zarr.Array)
    return [str(name) for name in np.asarray(names[:])], np.asarray(vectors[:])


def test_sentences_are_embedded_line_by_line(run: Path, aligned: Aligned, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a red\u2028circle\n\n  a blue star \n", encoding="utf-8")
    out = tmp_path / "lines.npy"
    assert sail("embed", run, "--texts", file, "--out", out).stdout == f"{out}\n"
    expected = aligned.encode_text(["a red\u2028circle", "a blue star"])
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)
    seconds = json.loads(sail("embed", run, "--texts", file, "--out", out, "--json").stdout)[
        "seconds"
    ]
    assert seconds.keys() == {"load", "tokenise", "encode", "write"}
    assert seconds["encode"] > 0


def test_the_images_of_a_run_become_one_file_for_embedding_atlas(
    run: Path, aligned: Aligned, test_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "atlas"
    assert sail("export", run, "--to", "embedding-atlas", "--out", out).stdout == f"{out}\n"
    table = pq.read_table(out / "images.parquet")
    rows = table.to_pylist()
    assert [row["split"] for row in rows] == ["train"] * 48 + ["test"] * 16
    keys = [row["key"] for row in rows]
    assert keys[48:] == test_store.keys().tolist()
    assert [row["caption"] for row in rows[48:]] == test_store.captions("long").tolist()
    vectors = np.array([row["embedding"] for row in rows])
    embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
    np.testing.assert_allclose(vectors[48:], embedder.images(test_store).vectors.numpy(), atol=1e-6)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    for number, row in enumerate(rows):
        ids, distances = row["neighbors"]["ids"], row["neighbors"]["distances"]
        assert len(ids) == 15
        np.testing.assert_allclose(distances, 1 - cosines[number][ids], atol=1e-5)
        np.testing.assert_allclose(distances, np.sort(1 - cosines[number])[:15], atol=1e-5)
    assert np.ptp([row["x"] for row in rows]) >= np.ptp([row["y"] for row in rows]) > 0
    assert "embedding-atlas images.parquet --text caption" in (out / "README.md").read_text()


def test_what_cannot_be_embedded_is_said(run: Path, aligned: Aligned, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"An image cannot be used: .* was expected"):
        aligned.encode_image([b"no image"])
    with pytest.raises(EncoderError, match=r"gone\.jpg cannot be read: No such file"):
        aligned.encode_image([tmp_path / "gone.jpg"])
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    out = tmp_path / "out.npy"
    for arguments, message in [
        (("search", tmp_path, "a star"), "has no config.toml"),
        (("search", run, "a star", "--split", "tset"), "no split 'tset'"),
        (("embed", run, "--texts", tmp_path / "gone.txt", "--out", out), "gone.txt cannot be read"),
        (("embed", run, "--texts", empty, "--out", out), "no line that is not empty"),
        (("embed", run, "--images", tmp_path, "--out", out), "There is no image under"),
        (("embed", run, "--texts", empty.with_name("x"), "--out", "o.csv"), "x cannot be read"),
    ]:
        error = the_error_of(sail(*arguments, expect=1))
        assert message in error
        assert "was expected" in error or "were expected" in error
    assert "either" in sail("search", run, expect=2).stderr
    assert not out.exists()
