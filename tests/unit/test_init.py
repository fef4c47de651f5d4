"""`sail init`: what it finds out of data as people have them, and the run file that it writes."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.index import build_index
from pipeline.run.config import RunConfig, load_config
from tests import tiny
from tests.commands import sail, the_error_of

CAPTION = "two dogs – schön"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder: Path, names: list[str]) -> list[Path]:
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.encoded(tiny.picture(number)))
    return paths


def init(what: object, *more: object) -> tuple[RunConfig, str]:
    """Call it; return the run file as the stages read it, and what was said."""
    encoders = ("--image-encoder", "bundled:scenes", "--text-encoder", tiny_text())
    result = sail("init", what, "--yes", *encoders, *more)
    return load_config(result.stdout.strip()), result.stderr


def tiny_text() -> Path:
    folder = Path("text-encoder").absolute()
    return folder if folder.is_dir() else tiny.text_encoder(folder)


def rows_of(config: RunConfig, split: str = "train") -> list[dict[str, Any]]:
    """The captions, label and image of each row of the index that a split gets."""
    index = build_index(config.data[split].open(), Path(f"{split}.parquet"))
    return [
        {"captions": each.captions, "label": each.label, "is_there": each.offset >= 0}
        for each in index.samples()
    ]


def test_a_table_of_excel_elsewhere_with_absolute_paths(here: Path) -> None:
    files = pictures(here / "nas" / "Großeltern", [f"Sommer {i}.jpg" for i in range(20)])
    table = here / "documents" / "Fotos.csv"
    table.parent.mkdir()
    lines = ["Bild;Beschreibung;Jahr", *(f"{path};{CAPTION};2001" for path in files)]
    table.write_bytes("\r\n".join(lines).encode("cp1252"))
    config, told = init("documents/Fotos.csv", "--out", "mine.toml")
    assert "as cp1252 it says" in told
    rows = rows_of(config) + rows_of(config, "test")
    assert len(rows) == 20
    assert all(row["is_there"] and row["captions"] == {"Beschreibung": CAPTION} for row in rows)
    assert config.align.model_fields_set <= {"holdout", "loss"}  # the rest follows from the rows
    assert config.eval.checkpoint == "last"


def test_pictures_without_a_word_get_a_table_to_write_captions_into(here: Path) -> None:
    pictures(here / "phone" / "DCIM", [f"IMG_{i:02d}.JPG" for i in range(25)])
    config, told = init("phone")
    table = (here / "captions.csv").read_text("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["image"] for row in rows] == [f"phone/DCIM/IMG_{i:02d}.JPG" for i in range(25)]
    assert "Write what is on it behind the comma" in told
    filled = "\n".join(["image,caption", *(f"{row['image']},a dog" for row in rows)])
    (here / "captions.csv").write_text(filled, "utf-8")
    rows = rows_of(config) + rows_of(config, "test")
    assert [row["captions"] for row in rows] == 25 * [{"caption": "a dog"}]


def test_texts_beside_pictures_and_words_in_names_are_captions(here: Path) -> None:
    for picture in pictures(here / "lora", [f"{i}.png" for i in range(5)]):
        picture.with_suffix(".txt").write_text(f"text {picture.stem}")
    config, _ = init("lora")
    assert {"txt": "text 3"} in [r["captions"] for s in config.data for r in rows_of(config, s)]
    pictures(here / "named", ["two dogs_12.jpg", "IMG_0001 red house.jpg", "ein schöner Tag.jpg"])
    config, told = init("named")
    found = {row["captions"]["name"] for row in rows_of(config)}
    assert found == {"two dogs", "red house", "ein schöner Tag"}
    assert "words in the names of files are captions" in told


def test_folders_of_classes_with_a_test_split(here: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for name in ("fire_truck", "cat"):
            pictures(here / "set" / split / name, [f"{i}.jpg" for i in range(count)])
    config, told = init("set")
    assert [row["label"] for row in rows_of(config)] == [0] * 4 + [1] * 4
    assert {str(row["captions"]) for row in rows_of(config, "test")} == {
        "{'name': 'cat'}",
        "{'name': 'fire truck'}",
    }
    assert config.data["test"].share is None
    assert config.align.loss.positives == "identical"
    assert "and the folders classes" in told


def test_shards_of_several_splits(here: Path) -> None:
    for name, first in (("train-0", 0), ("train-1", 100), ("val-0", 200)):
        tiny.write_tar(here / "shards" / f"{name}.tar", tiny.samples(6, first=first))
    config, _ = init("shards")
    assert list(config.data) == ["train", "val"]
    assert len(rows_of(config)) == 12
    assert rows_of(config, "val")[0]["captions"].keys() == {"short", "long"}
    config, _ = init("shards/train-*.tar", "--out", "two.toml")
    assert len(rows_of(config)) == 12
    assert list(config.data) == ["train"]


def test_parquet_and_arrow_of_the_hub(here: Path) -> None:
    images = [{"bytes": tiny.encoded(tiny.picture(i)), "path": None} for i in range(8)]
    texts = [f"a picture number {i} of many" for i in range(8)]
    table = pa.table({"id": range(8), "img": images, "sentence": texts, "url": 8 * ["https://a b"]})
    (here / "hub" / "data").mkdir(parents=True)
    pq.write_table(table, here / "hub" / "data" / "train-00000-of-00001.parquet")
    pq.write_table(table, here / "hub" / "data" / "test-00000-of-00001.parquet")
    config, told = init("hub")
    assert [row["captions"] for row in rows_of(config, "test")] == [{"sentence": t} for t in texts]
    assert "train: 8 pictures, in the files" in told


def test_captions_of_coco_with_their_folder(here: Path) -> None:
    pictures(here / "coco" / "val2017", [f"{i:012d}.jpg" for i in range(4)])
    annotations = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(4)],
        "annotations": [{"id": i, "image_id": i % 4, "caption": f"a dog, {i}"} for i in range(8)],
    }
    path = here / "coco" / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(annotations))
    config, _ = init(path)
    rows = rows_of(config)
    assert len(rows) == 4
    assert all(row["is_there"] and len(row["captions"]) == 2 for row in rows)


def test_captions_of_kaggle_beside_a_folder_of_images(here: Path) -> None:
    pictures(here / "flickr" / "Images", ["a.jpg", "b.jpg"])
    lines = ["image,caption", *(f"{n}.jpg,a dog runs {i}" for n in "ab" for i in range(3))]
    (here / "flickr" / "captions.txt").write_text("\n".join(lines))
    config, _ = init("flickr")
    rows = rows_of(config)
    assert [(row["is_there"], len(row["captions"])) for row in rows] == 2 * [(True, 3)]


def test_what_is_none_of_this_is_refused_in_one_line(here: Path) -> None:
    assert "There is no 'nothing'" in the_error_of(sail("init", "nothing", "--yes", expect=1))
    (here / "empty").mkdir()
    error = the_error_of(sail("init", "empty", "--yes", expect=1))
    assert "holds neither pictures nor tables" in error
    (here / "numbers.csv").write_text("a,b\n1,2\n")
    error = the_error_of(sail("init", "numbers.csv", "--yes", expect=1))
    assert "No column of" in error
    (here / "gone.csv").write_text("image,caption\nnowhere/a.jpg,a dog\n")
    error = the_error_of(sail("init", "gone.csv", "--yes", expect=1))
    assert "none of the first 1 is there. In " in error
    pictures(here / "photos", ["a dog.jpg"])
    init("photos")
    error = the_error_of(sail("init", "photos", "--yes", expect=1))
    assert "photos.toml is there already" in error
    assert "give --yes" in sail("init", "photos", expect=2).stderr
