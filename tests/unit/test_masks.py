"""Pictures with masks: the layouts of the data sets, and what is wrong with files told in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluate.masks import FolderPictures, MaskedPictures, read_mask, read_mask_classes
from evaluate.measures.segmentation import Segmentation, SegmentationSettings
from evaluate.segmentation_sets import FOLDER, SEGMENTATION_SETS
from features.errors import ConfigError, EvaluationError
from pipeline.run.config import load_config
from tests import tiny
from tests.photographs import SHARED
from tests.servers import Bucket

SIZES = {"ade20k": 150, "camvid": 11, "coco-stuff": 171, "voc20": 20}


def save(path: Path, values: Any, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.array(values, dtype=np.uint8))
    if palette:
        mask = mask.convert("P")  # the values are kept as indices
        mask.putpalette([255 - i // 3 for i in range(768)])
    mask.save(path)


def put(folder: Path, name: str, values: Any, **options: Any) -> None:
    """Write a picture and its mask."""
    height, width = np.shape(values)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tiny.picture(0, width, height).save(folder / "images" / f"{name}.jpg")
    save(folder / "masks" / f"{name}.png", values, **options)


def open_masked(section: dict[str, Any], max_pixels: int) -> MaskedPictures:
    settings = SegmentationSettings.model_validate({"segmentation": {"own": section}})
    found = Segmentation().inputs(settings, max_pixels)["own"]
    assert isinstance(found, MaskedPictures)
    return found


def opened(folder: Path, classes: str, **settings: Any) -> FolderPictures:
    section = {"kind": "folder", "images": folder / "images", "masks": folder / "masks"}
    found = open_masked(section | {"classes": classes} | settings, max_pixels=10_000)
    assert isinstance(found, FolderPictures)
    return found


@pytest.mark.parametrize("name", SEGMENTATION_SETS)
def test_a_set_has_its_source_and_every_class_a_name_and_a_value(name: str) -> None:
    classes = read_mask_classes(name)
    assert len(classes.names) == len(set(classes.shown)) == SIZES[name]
    assert all(word == word.strip() for names in classes.names for word in names)
    for source in json.loads((FOLDER / f"{name}.json").read_text())["source"]:
        assert set(source) == {"repository", "file", "commit", "sha256", "licence"}


def test_ade20k_counts_from_one_and_leaves_zero_open(tmp_path: Path) -> None:
    put(tmp_path, "ADE_val_00000001", [[0, 1, 2], [3, 150, 13]])
    found = opened(tmp_path, "ade20k").read("ADE_val_00000001")
    assert found.labels.tolist() == [[-1, 0, 1], [2, 149, 12]]
    assert read_mask_classes("ade20k").names[12][0] == "person"


def test_coco_stuff_skips_the_labels_that_its_maps_do_not_use(tmp_path: Path) -> None:
    put(tmp_path, "000000000139", [[0, 10, 12, 181, 255]])
    assert opened(tmp_path, "coco-stuff").read("000000000139").labels.tolist() == [
        [0, 10, 11, 170, -1]
    ]
    shown = read_mask_classes("coco-stuff").shown
    assert (shown[10], shown[11], shown[170]) == ("fire hydrant", "stop sign", "wood")
    put(tmp_path, "000000000285", [[11]])  # a street sign, of which no map has a pixel
    with pytest.raises(EvaluationError, match=r"000000000285.png has the value 11, which is of no"):
        opened(tmp_path, "coco-stuff").read("000000000285")


def test_voc_leaves_background_and_borders_open_and_reads_a_list_and_a_palette(
    tmp_path: Path,
) -> None:
    put(tmp_path, "2007_000033", [[0, 1, 20, 255]], palette=True)
    tiny.picture(0).save(tmp_path / "images" / "2007_000027.jpg")  # of detection: has no mask
    listed = tmp_path / "val.txt"
    listed.write_text("2007_000033\n")
    found = opened(tmp_path, "voc20", names=listed)
    assert found.names == ("2007_000033",)
    assert found.read("2007_000033").labels.tolist() == [[-1, 0, 19, -1]]
    with pytest.raises(EvaluationError, match=r"1 of 2 masks are not in .*'2007_000027'"):
        opened(tmp_path, "voc20")


def test_camvid_leaves_its_twelfth_class_open(tmp_path: Path) -> None:
    put(tmp_path, "0001TP_008550", [[0, 10, 11, 255]])
    assert opened(tmp_path, "camvid").read("0001TP_008550").labels.tolist() == [[0, 10, -1, -1]]


def test_the_street_scenes_beside_the_repository_are_read(tmp_path: Path) -> None:
    folder = SHARED / "camvid" / "val"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; the pictures are not part of the repository")
    own = json.loads((folder.parent / "classes.json").read_text())["classes"]
    names = read_mask_classes("camvid").names
    assert all(word in names[number] for number, word in enumerate(own))
    section = {"kind": "folder", "images": folder / "images", "masks": folder / "masks"}
    found = open_masked(section | {"classes": "camvid"}, max_pixels=1_000_000)
    assert len(found.names) == 60
    assert found.read(found.names[0]).labels.shape == (360, 480)


def test_own_classes_are_counted_from_zero_unless_they_say_otherwise(tmp_path: Path) -> None:
    put(tmp_path, "a", [[0, 1, 255]])
    own = tmp_path / "classes.json"
    own.write_text(json.dumps({"classes": ["sky", ["road", "street"]]}))
    found = opened(tmp_path, str(own))
    assert found.read("a").labels.tolist() == [[0, 1, -1]]
    assert found.classes.names == (("sky",), ("road", "street"))
    own.write_text(json.dumps({"classes": ["sky", "road"], "values": [1, 255], "ignored": [0]}))
    assert opened(tmp_path, str(own)).read("a").labels.tolist() == [[-1, 0, 1]]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("[]", "cannot be read"),
        ('{"classes": []}', "0 classes and 0 values"),
        ('{"classes": ["a", "b"], "values": [1]}', "2 classes and 1 values"),
        ('{"classes": ["a", "b"], "values": [1, 1]}', "stands twice"),
        ('{"classes": ["a"], "values": [255]}', "stands twice"),
        ('{"classes": ["a"], "values": [70000]}', "from 0 to 65535"),
        ('{"classes": ["a", []]}', "a class has the names"),
    ],
)
def test_classes_that_make_no_sense_are_refused(tmp_path: Path, document: str, words: str) -> None:
    put(tmp_path, "a", [[0]])
    own = tmp_path / "classes.json"
    own.write_text(document)
    with pytest.raises(EvaluationError, match=words):
        opened(tmp_path, str(own))


def test_only_the_first_pictures_by_name_are_taken(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        put(tmp_path, name, [[0]])
    assert opened(tmp_path, "camvid", pictures=2).names == ("a", "b")


def test_a_missing_mask_or_picture_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a", [[0]])
    put(tmp_path, "b", [[0]])
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(EvaluationError, match=r"1 of 2 masks are not in .*masks: \['b'\]"):
        opened(tmp_path, "camvid")
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(EvaluationError, match=r"1 of 1 pictures are not in .*images: \['a'\]"):
        opened(tmp_path, "camvid")
    with pytest.raises(EvaluationError, match="There are no pictures in"):
        opened(tmp_path / "elsewhere", "camvid")
    with pytest.raises(EvaluationError, match=r"The names .* cannot be read"):
        opened(tmp_path, "camvid", names=tmp_path / "val.txt")


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a", [[0]])
    tiny.picture(0).save(tmp_path / "images" / "a.png")
    with pytest.raises(EvaluationError, match="two files named 'a'"):
        opened(tmp_path, "camvid")


def test_a_mask_of_another_size_of_colours_or_cut_off_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a", np.zeros((8, 6)))
    found = opened(tmp_path, "camvid")
    mask = tmp_path / "masks" / "a.png"
    save(mask, np.zeros((6, 8)))
    with pytest.raises(EvaluationError, match=r"a.png has 8 × 6 pixels, its picture .* has 6 × 8"):
        found.read("a")
    tiny.picture(0, 6, 8).save(mask)
    with pytest.raises(EvaluationError, match=r"a.png has colours \(RGB\)"):
        found.read("a")
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(EvaluationError, match=r"a.png cannot be read"):
        found.read("a")
    save(mask, np.zeros((8, 6)))
    (tmp_path / "images" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match=r"a.jpg cannot be read"):
        found.read("a")


def test_a_mask_of_sixteen_bits_is_read_and_its_values_are_checked() -> None:
    mask = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    values = read_mask(tiny.encoded(mask, "PNG"), "a", max_pixels=100)
    assert values.tolist() == [[0, 65535]]
    with pytest.raises(EvaluationError, match="has the value 65535"):
        read_mask_classes("camvid").labels(values, "a")


def test_pictures_and_masks_may_be_in_a_bucket(tmp_path: Path, s3: Bucket) -> None:
    put(tmp_path / "here", "a", [[0, 1, 255]])
    s3.upload(tmp_path / "here", "streets")
    local = opened(tmp_path / "here", "camvid")
    remote = opened(
        tmp_path, "camvid", images=s3.url("streets/images"), masks=s3.url("streets/masks")
    )
    assert remote.names == local.names == ("a",)
    there, here = remote.read("a"), local.read("a")
    np.testing.assert_array_equal(there.labels, here.labels)
    assert there.picture.tobytes() == here.picture.tobytes()
    assert remote.version() == remote.version()


def test_scenes_are_drawn_with_their_masks() -> None:
    section = {"kind": "scenes", "split": "test", "pictures": 3}
    found = open_masked(section, max_pixels=1)
    scene = found.read(found.names[2])
    assert scene.picture.size == scene.labels.shape == (96, 96)
    assert len(found.classes.names) == 120
    assert (scene.labels >= 0).any()
    assert (scene.labels == -1).any()


def test_paths_are_relative_to_the_run_file_and_faults_are_told_as_written(tmp_path: Path) -> None:
    section = '[eval.segmentation.streets]\nkind = "folder"\nimages = "pictures"\nmasks = "masks"\n'
    run_file = tiny.world(tmp_path, extra=[section, 'classes = "camvid"\ntemplates = ["a {}"]'])
    streets = load_config(str(run_file)).eval.of(SegmentationSettings).segmentation["streets"]
    assert streets.model_dump(mode="json")["images"] == str(tmp_path / "pictures")
    assert streets.model_dump(mode="json")["classes"] == "camvid"
    assert streets.templates == ("a {}",)
    own = load_config(str(run_file), ["eval.segmentation.streets.classes=own.json"])
    dumped = own.eval.of(SegmentationSettings).segmentation["streets"].model_dump(mode="json")
    assert dumped["classes"] == str(tmp_path / "own.json")
    with pytest.raises(ConfigError, match=r"eval.segmentation.streets: stride = 500 is more than"):
        load_config(str(run_file), ["eval.segmentation.streets.stride=500"])
    wrong = "eval.segmentation.streets.atention=qq"
    with pytest.raises(ConfigError, match=r"streets.atention: .* Did you mean 'attention'"):
        load_config(str(run_file), [wrong])
