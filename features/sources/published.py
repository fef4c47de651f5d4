"""Labelled data sets in the layouts of their authors, as torchvision unpacks them.

Each layout is a function that gives the images of a split with their labels, in the order of the
authors' list, and one that gives the names of the classes as torchvision and CLIP_benchmark have
them: `_` and `/` in the authors' names are blanks.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from pydantic import model_validator

from features.class_lists import read_class_list
from features.config import DataPlace
from features.errors import SourceError
from features.sources.base import (
    Counts,
    Known,
    Sample,
    SourceReader,
    SourceSettings,
    split_image_suffix,
)
from features.sources.image_folder import ImageFolder, place_image
from features.sources.text import lines_of
from features.storage import files
from features.storage.files import is_file
from features.storage.place import Place

Rows = Iterator[tuple[str, int]]
"""An image by its name in the folder, and its label."""
NOT_OF_THE_LAYOUT = (OSError, ValueError, LookupError, TypeError, AttributeError)


class PublishedSource(SourceSettings):
    """A labelled data set as its authors publish it (docs/datasets.md)."""

    kind: Literal["published"]
    path: DataPlace
    """Folder that torchvision unpacks, such as `food-101`, `oxford-iiit-pet` or `SUN397`; of
    `imagenet-val` the one that holds `ILSVRC2012_img_val` and `ILSVRC2012_devkit_t12`."""
    dataset: Literal[
        "food-101",
        "dtd",
        "fgvc-aircraft",
        "oxford-pets",
        "flowers-102",
        "stanford-cars",
        "sun397",
        "imagenet-val",
    ]
    """Which one. Of DTD it is the authors' first partition, of SUN397 all images."""
    split: Literal["train", "test"] = "test"
    """Which of the authors' lists; SUN397 and `imagenet-val` have one alone."""

    unused = frozenset({"captions", "label", "group"})

    @model_validator(mode="after")
    def _split_is_there(self) -> "PublishedSource":
        if self.split == "train" and self.split not in LAYOUTS[self.dataset].lists:
            raise ValueError(f"{self.dataset} has no split 'train' here; take `split` out")
        return self

    def _open(self, known: Known) -> "Published":
        file = self.path / LAYOUTS[self.dataset].lists[self.split]
        if not is_file(file):
            raise SourceError(
                f"{self.path} has no file {LAYOUTS[self.dataset].lists[self.split]}. The folder of "
                f"{self.dataset} as torchvision unpacks it was expected. Correct `path` of the "
                f"source."
            )
        return Published(self, [file], known)


class Published(SourceReader[PublishedSource]):
    """Lists the images of a split; a list of the authors says which and of what class."""

    has_captions = False

    @cached_property
    def _layout(self) -> "DatasetLayout":
        return LAYOUTS[self.source.dataset]

    def own_class_names(self) -> tuple[tuple[str, ...], Place] | None:
        """Return the names that the authors' files have; of ImageNet they are wnids."""
        file = self.source.path / self._layout.lists[self.source.split]
        names = self._read(file, lambda: self._layout.classes(self.source))
        return (tuple(names), self.source.path) if names else None

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the labels, those of a list that ships with the program by name.

        CLIP's list of the pets has another order than their authors' labels.
        """
        given, own = self.source.class_names, self.own_class_names()
        if own is None or not isinstance(given, str):
            return super().class_names()
        return read_class_list(given).names_of_folders(own[0], str(self.source.path))

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield the images of the split in the authors' order.

        Raises:
            SourceError: The files are not of the layout.
        """
        keys, images = self.keys(file, counts), ImageFolder(self.source.path, file)
        for name, label in self._read(file, lambda: list(self._layout.rows(self.source))):
            key, problem = keys.of(*split_image_suffix(name))
            sample = Sample(key, problem=problem, label=label)
            place_image(sample, images.find(name), images, self, counts)
            yield sample

    def _read(self, file: Place, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except NOT_OF_THE_LAYOUT as error:
            raise SourceError(
                f"{file} and what lies beside it cannot be read as {self.source.dataset}: "
                f"{type(error).__name__} {error}. The files that torchvision unpacks were "
                f"expected. Correct `path` or `dataset` of the source, or fetch them again."
            ) from error


@dataclass(frozen=True)
class DatasetLayout:
    """Where a data set has what."""

    lists: Mapping[str, str]
    """By split, a file that says what belongs to it."""
    rows: Callable[[PublishedSource], Rows]
    classes: Callable[[PublishedSource], list[str]]
    """Names of the labels; none where the authors' files have none."""


def _lines(path: Place) -> list[str]:
    text = files.read(path).decode("utf-8-sig")
    return [line.strip() for line in lines_of(text) if line.strip()]


def _words(name: str) -> str:
    return re.sub(r"[_/]+", " ", name)


def _listed(source: PublishedSource) -> Place:
    return source.path / LAYOUTS[source.dataset].lists[source.split]


def _matlab(path: Place) -> dict[str, Any]:
    from scipy.io import loadmat

    found: dict[str, Any] = loadmat(io.BytesIO(files.read(path)), squeeze_me=True)
    return found


def _food_classes(source: PublishedSource) -> list[str]:
    return sorted(json.loads(files.read(_listed(source))))


def _food(source: PublishedSource) -> Rows:
    images = json.loads(files.read(_listed(source)))
    for label, name in enumerate(sorted(images)):
        yield from ((f"images/{image}.jpg", label) for image in images[name])


def _dtd_classes(source: PublishedSource) -> list[str]:
    return sorted(name for name, size in files.children(source.path / "images") if size is None)


def _dtd(source: PublishedSource) -> Rows:
    labels = {name: label for label, name in enumerate(_dtd_classes(source))}
    for line in _lines(_listed(source)):
        yield f"images/{line}", labels[line.partition("/")[0]]


def _aircraft_classes(source: PublishedSource) -> list[str]:
    return _lines(source.path / "data/variants.txt")


def _aircraft(source: PublishedSource) -> Rows:
    labels = {name: label for label, name in enumerate(_aircraft_classes(source))}
    for line in _lines(_listed(source)):
        image, _, name = line.partition(" ")
        yield f"data/images/{image}.jpg", labels[name]


def _pets_rows(source: PublishedSource) -> Iterator[tuple[str, int]]:
    for line in _lines(_listed(source)):
        image, label, _, _ = line.split()
        yield image, int(label) - 1


def _pets_classes(source: PublishedSource) -> list[str]:
    names = {label: image.rpartition("_")[0] for image, label in _pets_rows(source)}
    return [_words(names[label]).title() for label in range(max(names) + 1)]


def _pets(source: PublishedSource) -> Rows:
    return ((f"images/{image}.jpg", label) for image, label in _pets_rows(source))


def _flowers(source: PublishedSource) -> Rows:
    of_split = {"train": "trnid", "test": "tstid"}[source.split]
    labels = _matlab(source.path / "imagelabels.mat")["labels"]
    for number in _matlab(source.path / "setid.mat")[of_split].tolist():
        yield f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1


def _cars_classes(source: PublishedSource) -> list[str]:
    return list(map(str, _matlab(source.path / "devkit/cars_meta.mat")["class_names"]))


def _cars(source: PublishedSource) -> Rows:
    for each in _matlab(_listed(source))["annotations"]:
        yield f"cars_{source.split}/{each['fname']}", int(each["class"]) - 1


def _sun_classes(source: PublishedSource) -> list[str]:
    return [line.removeprefix("/")[2:] for line in _lines(_listed(source))]


def _sun(source: PublishedSource) -> Rows:
    for label, line in enumerate(_lines(_listed(source))):
        folder = line.removeprefix("/")
        for name, size in files.children(source.path / folder):
            if size is not None and name.startswith("sun_"):
                yield f"{folder}/{name}", label


DEVKIT = "ILSVRC2012_devkit_t12/data"


def _imagenet_classes(_: PublishedSource) -> list[str]:
    return list(read_class_list("imagenet-1k").folders or ())


def _imagenet(source: PublishedSource) -> Rows:
    synsets = _matlab(source.path / DEVKIT / "meta.mat")["synsets"]
    wnids = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
    labels = {wnid: label for label, wnid in enumerate(_imagenet_classes(source))}
    for number, line in enumerate(_lines(_listed(source)), 1):
        name = f"ILSVRC2012_img_val/ILSVRC2012_val_{number:08d}.JPEG"
        yield name, labels[wnids[int(line)]]


def _both(name: str) -> dict[str, str]:
    return {split: name.format(split) for split in ("train", "test")}


LAYOUTS: Mapping[str, DatasetLayout] = MappingProxyType(
    {
        "food-101": DatasetLayout(
            _both("meta/{}.json"), _food, lambda s: list(map(_words, _food_classes(s)))
        ),
        "dtd": DatasetLayout(_both("labels/{}1.txt"), _dtd, _dtd_classes),
        "fgvc-aircraft": DatasetLayout(
            {"train": "data/images_variant_trainval.txt", "test": "data/images_variant_test.txt"},
            _aircraft,
            _aircraft_classes,
        ),
        "oxford-pets": DatasetLayout(
            {"train": "annotations/trainval.txt", "test": "annotations/test.txt"},
            _pets,
            _pets_classes,
        ),
        "flowers-102": DatasetLayout(_both("setid.mat"), _flowers, lambda _: []),
        "stanford-cars": DatasetLayout(
            {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"},
            _cars,
            _cars_classes,
        ),
        "sun397": DatasetLayout(
            {"test": "ClassName.txt"}, _sun, lambda s: list(map(_words, _sun_classes(s)))
        ),
        "imagenet-val": DatasetLayout(
            {"test": f"{DEVKIT}/ILSVRC2012_validation_ground_truth.txt"},
            _imagenet,
            _imagenet_classes,
        ),
    }
)
