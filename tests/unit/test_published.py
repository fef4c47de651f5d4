"""Labelled data sets as torchvision unpacks them: images, labels and names in the right order."""

from pathlib import Path
from typing import Any

import pytest

from features.class_lists import read_class_list
from features.errors import SourceError
from features.index import Index, SampleReader, build_index
from features.sources.published import LAYOUTS
from tests import published, tiny
from tests.source_suite import parsed

LABELS = [3, 0, 36, 7, 3]
PICTURES = [(tiny.encoded(tiny.picture(number)), label) for number, label in enumerate(LABELS)]
EVERY_PET = [*PICTURES, *((PICTURES[0][0], label) for label in range(37))]


def labels(index: Index) -> list[int]:
    return [sample.label for sample in index.samples()]


def built(folder: Path, **settings: Any) -> Index:
    source = parsed({"kind": "published", **settings})
    return build_index(source.open(), folder / "index.parquet")


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_every_layout_gives_each_image_its_label_and_each_label_its_name(
    tmp_path: Path, dataset: str
) -> None:
    pictures = EVERY_PET if dataset == "oxford-pets" else PICTURES
    path = published.write(tmp_path / "data", dataset, pictures)
    names = "imagenet-1k" if dataset == "imagenet-val" else dataset
    index = built(tmp_path, dataset=dataset, path=path, class_names=names)
    classes = read_class_list(names).classes
    assert sorted(index.class_names or ()) == sorted(classes)
    if dataset != "oxford-pets":  # whose labels are in another order than the names of CLIP's list
        assert index.class_names == classes
    read = SampleReader(index).read(0, index.rows)
    assert sorted(zip(read, labels(index), strict=True)) == sorted(pictures)


def test_names_are_as_torchvision_has_them(tmp_path: Path) -> None:
    expected = {"food-101": (0, "apple pie"), "oxford-pets": (2, "American Pit Bull Terrier")}
    expected |= {"sun397": (1, "airplane cabin"), "fgvc-aircraft": (2, "737-200")}
    for dataset, (label, name) in expected.items():
        path = published.write(tmp_path / "data", dataset, EVERY_PET)
        names = built(tmp_path / dataset, dataset=dataset, path=path).class_names
        assert names is not None
        assert names[label] == name


def test_labels_of_imagenet_are_those_of_the_sorted_wnids_and_not_of_the_authors(
    tmp_path: Path,
) -> None:
    path = published.write(tmp_path / "data", "imagenet-val", PICTURES)
    index = built(tmp_path, dataset="imagenet-val", path=path, class_names="imagenet-1k")
    assert labels(index) == LABELS
    assert index.class_names is not None
    assert index.class_names[3] == "tiger shark"


def test_an_image_that_is_not_there_keeps_its_row(tmp_path: Path) -> None:
    path = published.write(tmp_path / "data", "dtd", PICTURES)
    next((path / "images").glob("*/*_0001.jpg")).unlink()
    index = built(tmp_path, dataset="dtd", path=path)
    assert index.rows == len(PICTURES)
    assert sum(image is None for image in SampleReader(index).read(0, index.rows)) == 1


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("annotations/test.txt", "Abyssinian_1 1\n", "cannot be read as oxford-pets"),
        ("annotations/test.txt", None, "has no file annotations/test.txt"),
    ],
)
def test_files_of_another_layout_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | None, why: str
) -> None:
    path = published.write(tmp_path / "data", "oxford-pets", EVERY_PET)
    (path / name).unlink()
    if content is not None:
        (path / name).write_text(content)
    with pytest.raises(SourceError, match=why):
        built(tmp_path, dataset="oxford-pets", path=path)


def test_a_split_that_a_data_set_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="sun397 has no split 'train' here"):
        parsed({"kind": "published", "dataset": "sun397", "path": "x", "split": "train"})
