"""Writes small data sets in the layouts of their authors, as torchvision unpacks them."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

from features.class_lists import read_class_list

Pictures = Sequence[tuple[bytes, int]]
"""Images, and the numbers of their classes."""
FOLDERS = {
    "food-101": "food-101",
    "dtd": "dtd/dtd",
    "fgvc-aircraft": "fgvc-aircraft-2013b",
    "oxford-pets": "oxford-iiit-pet",
    "flowers-102": "flowers-102",
    "stanford-cars": "stanford_cars",
    "sun397": "SUN397",
    "imagenet-val": "imagenet",
}
"""Where torchvision puts them below its root."""


def _put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def names_of(name: str) -> list[str]:
    """The names of the classes as the authors' files have them."""
    return [re.sub(r"[ /]", "_", each.lower()) for each in read_class_list(name).classes]


def food(folder: Path, pictures: Pictures) -> None:
    names = sorted(names_of("food-101"))
    listed: dict[str, list[str]] = {name: [] for name in names}
    for number, (image, label) in enumerate(pictures):
        listed[names[label]].append(f"{names[label]}/{number}")
        _put(folder / f"images/{names[label]}/{number}.jpg", image)
    _put(folder / "meta/test.json", json.dumps(listed))


def dtd(folder: Path, pictures: Pictures) -> None:
    names, lines = sorted(names_of("dtd")), list[str]()
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
    for number, (image, label) in enumerate(pictures):
        lines.append(f"{names[label]}/{names[label]}_{number:04d}.jpg")
        _put(folder / f"images/{lines[-1]}", image)
    _put(folder / "labels/test1.txt", "\n".join(lines) + "\n")


def aircraft(folder: Path, pictures: Pictures) -> None:
    names, lines = list(read_class_list("fgvc-aircraft").classes), list[str]()
    for number, (image, label) in enumerate(pictures):
        lines.append(f"{number:07d} {names[label]}")
        _put(folder / f"data/images/{number:07d}.jpg", image)
    _put(folder / "data/variants.txt", "\n".join(names) + "\n")
    _put(folder / "data/images_variant_test.txt", "\n".join(lines) + "\n")


def pets(folder: Path, pictures: Pictures) -> None:
    names, lines = sorted(names_of("oxford-pets")), list[str]()
    for number, (image, label) in enumerate(pictures):
        lines.append(f"{names[label].title()}_{number} {label + 1} 1 1")
        _put(folder / f"images/{lines[-1].split()[0]}.jpg", image)
    _put(folder / "annotations/test.txt", "\n".join(lines) + "\n")


def flowers(folder: Path, pictures: Pictures) -> None:
    for number, (image, _) in enumerate(pictures, 1):
        _put(folder / f"jpg/image_{number:05d}.jpg", image)
    labels, numbers = [label + 1 for _, label in pictures], np.arange(1, len(pictures) + 1)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels])})
    savemat(folder / "setid.mat", {"tstid": numbers, "trnid": numbers[:1], "valid": numbers[:1]})


def cars(folder: Path, pictures: Pictures) -> None:
    for number, (image, _) in enumerate(pictures, 1):
        _put(folder / f"cars_test/{number:05d}.jpg", image)
    about = [("class", object), ("fname", object)]
    rows = [(label + 1, f"{number:05d}.jpg") for number, (_, label) in enumerate(pictures, 1)]
    annotations = np.array(rows, dtype=about)[None]
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    (folder / "devkit").mkdir(exist_ok=True)
    names = np.array(read_class_list("stanford-cars").classes, dtype=object)[None]
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})


def sun(folder: Path, pictures: Pictures) -> None:
    names = [f"{each[0]}/{each}" for each in names_of("sun397")]
    _put(folder / "ClassName.txt", "".join(f"/{name}\n" for name in names))
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(pictures):
        _put(folder / names[label] / f"sun_a{number}.jpg", image)


def imagenet(folder: Path, pictures: Pictures) -> None:
    wnids = list(read_class_list("imagenet-1k").folders or ())
    order = np.random.default_rng(0).permutation(len(wnids))  # their numbers are of another order
    place = {wnids[label]: number for number, label in enumerate(order, 1)}
    data = folder / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    synsets = np.array(
        [(number, wnid) for wnid, number in sorted(place.items(), key=lambda each: each[1])],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object)],
    )
    savemat(data / "meta.mat", {"synsets": synsets[:, None]})
    lines = [f"{place[wnids[label]]}\n" for _, label in pictures]
    _put(data / "ILSVRC2012_validation_ground_truth.txt", "".join(lines))
    for number, (image, _) in enumerate(pictures, 1):
        _put(folder / f"ILSVRC2012_img_val/ILSVRC2012_val_{number:08d}.JPEG", image)


WRITERS: dict[str, Callable[[Path, Pictures], None]] = {
    "food-101": food,
    "dtd": dtd,
    "fgvc-aircraft": aircraft,
    "oxford-pets": pets,
    "flowers-102": flowers,
    "stanford-cars": cars,
    "sun397": sun,
    "imagenet-val": imagenet,
}


def write(root: Path, dataset: str, pictures: Pictures) -> Path:
    """Write a data set below a root as torchvision does; return its folder."""
    folder = root / FOLDERS[dataset]
    folder.mkdir(parents=True)
    WRITERS[dataset](folder, pictures)
    return folder
