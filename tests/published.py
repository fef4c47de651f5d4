"""Writes small data sets in the layouts of their authors, as torchvision unpacks them."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from features.class_lists import read_class_list
from tests import tiny

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


def image_name(number: int) -> str:
    return f"{number:012d}.jpg"


def coco(folder: Path, count: int = 12) -> None:
    """val2017 with five captions of each image, and the masks of COCO-Stuff."""
    images, annotations = [], []
    for number in range(count):
        _put(folder / "val2017" / image_name(number), tiny.encoded(tiny.picture(number)))
        images.append({"id": number, "file_name": image_name(number)})
        annotations += [
            {"image_id": number, "caption": tiny.caption(10 * number + each)} for each in range(5)
        ]
        masks(folder / "stuffthingmaps_trainval2017/val2017", image_name(number), [0, 1, 255])
    document = {"images": images, "annotations": annotations}
    _put(folder / "annotations/captions_val2017.json", json.dumps(document))


def masks(folder: Path, name: str, values: Sequence[int]) -> None:
    """A mask of stripes, of the size of `tiny.picture`."""
    folder.mkdir(parents=True, exist_ok=True)
    stripes = np.repeat(np.array(values, dtype=np.uint8), -(-20 // len(values)))[:20]
    image = Image.fromarray(np.tile(stripes[:, None], (1, 24)))
    image.save(folder / Path(name).with_suffix(".png").name)


def flickr30k(folder: Path, count: int = 10) -> None:
    images = []
    for number in range(count):
        name = f"{number}.jpg"
        _put(folder / "flickr30k-images" / name, tiny.encoded(tiny.picture(100 + number)))
        sentences = [{"raw": tiny.caption(700 + 10 * number + each)} for each in range(5)]
        images.append({"filename": name, "split": "test", "sentences": sentences})
    _put(folder / "dataset_flickr30k.json", json.dumps({"images": images}))


def winoground(folder: Path, count: int = 8) -> None:
    lines = []
    for number in range(count):
        example: dict[str, object] = {"id": number}
        for each in range(2):
            name = f"ex_{number}_img_{each}"
            picture = tiny.encoded(tiny.picture(300 + 2 * number + each), "PNG")
            _put(folder / f"winoground/data/images/{name}.png", picture)
            example |= {f"image_{each}": name, f"caption_{each}": tiny.caption(2 * number + each)}
        lines.append(json.dumps(example))
    _put(folder / "winoground/data/examples.jsonl", "\n".join(lines))


def mmvp(folder: Path, count: int = 10) -> None:
    lines = ["Question ID,Type,Statement"]
    for number in range(1, count + 1):
        lines.append(f"{number},Color,{tiny.caption(number)}")
        image = tiny.encoded(tiny.picture(400 + number))
        _put(folder / f"MMVP_VLM/MLLM_VLM Images/Color/{number}.jpg", image)
    _put(folder / "MMVP_VLM/Questions.csv", "\n".join(lines) + "\n")


def ade20k(folder: Path, count: int = 3) -> None:
    place = folder / "ADEChallengeData2016"
    for number in range(count):
        name = f"ADE_val_{number:08d}.jpg"
        _put(place / "images/validation" / name, tiny.encoded(tiny.picture(number)))
        masks(place / "annotations/validation", name, [0, 1, 5, 150])


def voc(folder: Path, count: int = 3) -> None:
    place = folder / "VOCdevkit/VOC2012"
    for number in range(count):
        _put(place / f"JPEGImages/2007_{number}.jpg", tiny.encoded(tiny.picture(number)))
        masks(place / "SegmentationClass", f"2007_{number}.jpg", [0, 1, 20, 255])
    names = "".join(f"2007_{number}\n" for number in range(count))
    _put(place / "ImageSets/Segmentation/val.txt", names)


def cifar(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for name, head, file, names in (
        ("cifar-10", b"", "cifar-10-batches-bin/test_batch.bin", "batches.meta.txt"),
        ("cifar-100", b"\0", "cifar-100-binary/test.bin", "fine_label_names.txt"),
    ):
        records = b"".join(head + bytes([i]) + row.tobytes() for i, row in enumerate(pixels))
        _put(folder / file, records)
        classes = "\n".join(each.replace(" ", "_") for each in read_class_list(name).classes)
        _put(folder / file.partition("/")[0] / names, classes)


def class_folders(folder: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        _put(folder / name / f"image_{number}.jpg", tiny.encoded(tiny.picture(500 + number)))


def root(folder: Path) -> Path:
    """Write every data set of the suites, each in the layout of its authors."""
    pictures = [(tiny.encoded(tiny.picture(number)), number % 5) for number in range(6)]
    every_pet = [(pictures[0][0], label) for label in range(37)]
    for dataset in WRITERS:
        write(folder, dataset, every_pet if dataset == "oxford-pets" else pictures)
    caltech = read_class_list("caltech-101").folders or ()
    class_folders(folder / "caltech101/101_ObjectCategories", caltech[1:5])
    class_folders(folder / "imagenetv2-matched-frequency-format-val", ["0", "1", "10", "999"])
    coco(folder / "coco")
    flickr30k(folder / "flickr30k")
    for each in (winoground, mmvp, ade20k, voc, cifar):
        each(folder)
    return folder
