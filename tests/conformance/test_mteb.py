"""mteb's own task classes measure a run, on data made here, as this program does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluate.embedder import Embedder
from features.errors import EvaluationError, LockedError
from features.store import FeatureStore
from pipeline.mteb_model import FeatureCache, measured, model_of
from pipeline.python import load_aligned
from pipeline.run.aligned import Aligned
from tests import published, tiny
from tests.commands import sail, the_error_of
from tests.trained import trained

mteb: Any = pytest.importorskip("mteb", reason="mteb is not installed")
datasets: Any = pytest.importorskip("datasets", reason="datasets is not installed")

CLASSES = ["red", "blue", "star", "circle"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def aligned(run: Path) -> Aligned:
    return load_aligned(run, device="cpu")


def zero_shot() -> Any:
    """Mteb's CIFAR-10 task, on pictures of ours."""
    task = mteb.get_task("CIFAR10ZeroShot")
    pictures = [tiny.reopened(tiny.picture(number)).convert("RGB") for number in range(24)]
    columns = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    )
    rows = {"img": pictures, "label": [number % 4 for number in range(24)]}
    task.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, columns)})
    task.data_loaded = True
    return task


def winoground(folder: Path) -> Any:
    """Mteb's Winoground task, on the groups of `published.winoground`."""
    task, rows = mteb.get_task("Winoground"), []
    for line in (folder / "winoground/data/examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        for each in range(2):
            path = folder / "winoground/data/images" / f"{example[f'image_{each}']}.png"
            with Image.open(path) as image:
                example[f"image_{each}"] = image.convert("RGB")
        rows.append(example)
    whole = {name: [row[name] for row in rows] for name in rows[0]}
    task.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(whole)})
    task.data_loaded = True
    return task


def test_zero_shot_of_mteb_is_ours(aligned: Aligned, tmp_path: Path) -> None:
    (found,) = measured(model_of(aligned), zero_shot(), tmp_path)
    pictures = [tiny.encoded(tiny.reopened(tiny.picture(number)), "PNG") for number in range(24)]
    texts = aligned.encode_text([f"a photo of a {name}." for name in CLASSES])
    nearest = (aligned.encode_image(pictures) @ texts.T).argmax(axis=1)
    assert found["value"] == np.mean(nearest == np.arange(24) % 4)
    assert (found["task"], found["metric"]) == ("CIFAR10ZeroShot", "accuracy")


def test_winoground_of_mteb_is_that_of_sail_eval(
    run: Path, aligned: Aligned, tmp_path: Path
) -> None:
    published.winoground(tmp_path)
    command = ("--head", run, "--data", tmp_path, "--out", tmp_path / "out")
    printed = sail("eval", "--suite", "sail-released", *command).stdout
    (path,) = (Path(each) for each in printed.splitlines() if each.endswith("results.json"))
    ours = {each["metric"]: each["value"] for each in json.loads(path.read_text())["results"]}
    task = winoground(tmp_path)
    result = mteb.evaluate(model_of(aligned), task, cache=None)
    (scores,) = result.task_results[0].scores["test"]
    for name, metric in (("text_acc", "text_score"), ("image_acc", "image_score")):
        assert scores[name] == ours[metric]


def test_a_second_head_encodes_nothing(
    run: Path, aligned: Aligned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features.zarr"
    with FeatureCache(folder) as cache:
        first = measured(model_of(aligned, cache), zero_shot(), tmp_path / "a")
    again = load_aligned(run, device="cpu")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an encoder worked again")

    for name in ("load_image_encoder", "load_text_encoder"):
        monkeypatch.setattr(f"pipeline.run.aligned.{name}", refuse)
    with FeatureCache(folder) as cache:
        found = measured(model_of(again, cache), zero_shot(), tmp_path / "b")
    assert found == first


def test_features_that_are_kept_are_those_of_the_store(
    run: Path, aligned: Aligned, tmp_path: Path
) -> None:
    store = FeatureStore.open(run / "features" / "test.zarr")
    captions = [str(each) for each in store.captions("long")]
    batches = [{"text": captions[:5]}, {"text": captions[5:]}]
    embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
    expected = embedder.captions(store, "long").vectors.numpy()
    with FeatureCache(tmp_path / "f.zarr") as cache:
        model = model_of(aligned, cache)
        np.testing.assert_allclose(model.encode(batches), expected, atol=2e-3)
        np.testing.assert_array_equal(model.encode(batches), model.encode(batches))
        with pytest.raises(EvaluationError, match=r"has items of \['audio'\]"):
            model.encode([{"audio": [1]}])


def test_pictures_that_differ_in_colours_or_orientation_alone_are_told_apart(
    aligned: Aligned, tmp_path: Path
) -> None:
    red, blue = (Image.new("P", (20, 20)) for _ in range(2))
    red.putpalette([255, 0, 0] + [0] * 765)
    blue.putpalette([0, 0, 255] + [0] * 765)
    with FeatureCache(tmp_path / "f.zarr") as cache:
        found = model_of(aligned, cache).encode([{"image": [red, blue]}])
    expected = aligned.encode_image([red.convert("RGB"), blue.convert("RGB")])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_two_commands_do_not_write_one_cache_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder, items = tmp_path / "f.zarr", [bytes([number]) * 32 for number in range(5)]
    features = np.arange(15, dtype=np.float32).reshape(5, 3)
    with FeatureCache(folder) as cache:
        cache.read("x", items[:2], lambda places: features[list(places)])
        with pytest.raises(LockedError, match="is being written"), FeatureCache(folder):
            pass
    with FeatureCache(folder) as cache:
        found = cache.read("x", items[::-1], lambda places: features[::-1][list(places)])
        np.testing.assert_array_equal(found, features[::-1])
    (chunk,) = (path for path in (folder / "x/features").rglob("0") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with FeatureCache(folder) as cache, pytest.raises(EvaluationError, match="cannot be read"):
        cache.read("x", items, lambda places: features[list(places)])


def test_a_task_that_is_not_there_is_refused_in_one_line(run: Path) -> None:
    error = the_error_of(sail("eval", run, "--mteb", "NoSuchTask", expect=1))
    assert "has no task 'NoSuchTask'" in error
