"""Annotation files of known benchmarks, one function a format: what their rows are.

Of a group of two rows, image i belongs to caption i. Of a group of one row, the caption in the
first field is right and the others are not; where fields are called `negative…`, these are not.
"""

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from features.sources.base import Counts, split_image_suffix
from features.sources.text import lines_of
from features.storage import files
from features.storage.place import Place

MMVP_PROMPT = "a photo of {}"
"""What MMVP-VLM's own script puts around a statement."""
MAX_BOX_PIXELS = 1 << 26
"""Room for a box of any photograph, but not for all memory there is."""
XM3600_KEY = "image/key"

# The published .csv lacks the second bar in one of its lines.
# That of Flickr8k has a ".1" behind the name of an image.
FLICKR_LINE = re.compile(
    r"(?P<image>[^|#]+\.(?:jpe?g|png|webp))(?:\.\d+)?\s*[|#]\s*\d+\s*\|?\s*(?P<caption>.*)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Record:
    """One row of a benchmark."""

    key: str
    image: str
    captions: Mapping[str, str]
    group: int = -1
    box: Sequence[int] | None = None
    """The part of the image that the row is of: left, top, right and bottom in pixels."""
    kind: str = ""
    """What the authors score apart: the visual pattern, the way in which a caption is wrong."""


@dataclass(frozen=True)
class AnnotationFile:
    """A file of annotations, and the settings that say what is read of it."""

    place: Place
    split: str
    captions_per_image: int
    counts: Counts
    is_one_of_several: bool
    """Whether the source has more files like it, each a part that is scored apart."""

    @cached_property
    def text(self) -> str:
        """All of it."""
        return files.read(self.place).decode("utf-8-sig")

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return PurePosixPath(self.place.name).stem

    def lines(self) -> Iterator[Any]:
        """Yield the documents of a `.jsonl`."""
        return map(json.loads, filter(str.strip, lines_of(self.text)))

    def described(self, image: str, captions: Sequence[str]) -> Record:
        """Return the row of an image with its first captions."""
        texts = _numbered(*captions[: self.captions_per_image])
        return Record(_without_suffix(image), image, texts)


def _karpathy(file: AnnotationFile) -> Iterator[Record]:
    """`dataset_coco.json`, `dataset_flickr30k.json`: captions under `sentences`, with a split."""
    images = json.loads(file.text)["images"]
    _check_split(file, {image["split"] for image in images})
    for image in images:
        if image["split"] == file.split:
            path = PurePosixPath(image.get("filepath", ""), image["filename"])
            yield file.described(str(path), [sentence["raw"] for sentence in image["sentences"]])


def _coco(file: AnnotationFile) -> Iterator[Record]:
    """`captions_val2017.json`: images and captions apart, joined by id, in order of the image."""
    document = json.loads(file.text)
    captions: dict[int, list[str]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        if not isinstance(annotation.get("caption"), str):
            file.counts["annotations without a caption (ignored)"] += 1
        elif annotation["image_id"] in captions:
            captions[annotation["image_id"]].append(annotation["caption"])
        else:
            file.counts["captions of images that the file does not list (ignored)"] += 1
    if document["annotations"] and not any(captions.values()):
        raise ValueError("none of its annotations is a caption, as in those of boxes")
    for image in sorted(document["images"], key=lambda image: int(image["id"])):
        yield file.described(image["file_name"], captions[image["id"]])


def _flickr30k(file: AnnotationFile) -> Iterator[Record]:
    """`results_20130124.token` (name#number, a tab, caption) or `results.csv` (with ` | `)."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(filter(str.strip, lines_of(file.text)), 1):
        found = FLICKR_LINE.fullmatch(line.strip())
        if found:
            captions.setdefault(found["image"], []).append(found["caption"])
        elif number > 1 or not line.startswith("image_name"):  # the header of the .csv
            raise ValueError(f"line {number} is {line!r}")
    for name, texts in captions.items():
        yield file.described(name, texts)


def _xm3600(file: AnnotationFile) -> Iterator[Record]:
    """`captions.jsonl`: captions by language, about two of each, as fields `de.0`, `de.1`."""
    for line in file.lines():
        captions = {
            f"{language}.{i}": text
            for language, found in line.items()
            if isinstance(found, dict)
            for i, text in enumerate(found["caption"])
        }
        yield Record(line[XM3600_KEY], f"{line[XM3600_KEY]}.jpg", captions)


def _multi30k(file: AnnotationFile) -> Iterator[Record]:
    """`image_splits/test_2016_flickr.txt`, and beside its folder `raw/test_2016_flickr.LANGUAGE`.

    Image i belongs to line i of each; the files of captions may be in gzip, as they are published.
    """
    names = [line.partition("#")[0].strip() for line in lines_of(file.text) if line.strip()]
    raw, captions = file.place.parent.parent / "raw", dict[str, list[str]]()
    for name, size in files.children(raw):
        stem, _, language = name.removesuffix(".gz").rpartition(".")
        if size is None or stem != file.stem:
            continue
        content = files.read(raw / name)
        if name.endswith(".gz"):
            content = gzip.decompress(content)
        captions[language] = lines_of(content.decode("utf-8-sig"))
        if len(captions[language]) != len(names):
            raise ValueError(f"{raw / name} has {len(captions[language])} lines for {len(names)}")
    if not captions:
        raise ValueError(f"{raw} has no {file.stem}.en, nor one of another language")
    for i, image in enumerate(names):
        texts = {language: captions[language][i] for language in sorted(captions)}
        yield Record(_without_suffix(image), image, texts)


def _urban1k(file: AnnotationFile) -> Iterator[Record]:
    """`caption/1.txt`: one caption, that of `image/1.jpg`."""
    yield Record(file.stem, f"{file.stem}.jpg", {"long": " ".join(file.text.split())})


def _sharegpt4v(file: AnnotationFile) -> Iterator[Record]:
    """`share-captioner_coco_lcs_sam_1246k_1107.json`: the answer in each conversation."""
    for number, example in enumerate(json.loads(file.text)):
        answers = [said["value"] for said in example["conversations"] if said["from"] == "gpt"]
        yield Record(str(number), example["image"], {"long": answers[0].replace("\n", " ")})


def _docci(file: AnnotationFile) -> Iterator[Record]:
    """`docci_descriptions.jsonlines`: a description of each image, with a split."""
    examples = list(file.lines())
    _check_split(file, {example["split"] for example in examples})
    for example in examples:
        if example["split"] == file.split:
            captions = {"long": example["description"]}
            yield Record(example["example_id"], example["image_file"], captions)


def _dci(file: AnnotationFile) -> Iterator[Record]:
    """`complete/NAME.json`: a short caption, and with further words that of the whole image."""
    document = json.loads(file.text)
    short, more = document["short_caption"], document["extra_caption"]
    captions = {"short": short, "long": f"{short}\n{more}"}
    yield Record(_without_suffix(document["image"]), document["image"], captions)


def _winoground(file: AnnotationFile) -> Iterator[Record]:
    """`examples.jsonl`: two images, named without suffix by their authors, and two captions."""
    for number, example in enumerate(file.lines()):  # an `id` may come again in files made like it
        for i in range(2):
            name = example[f"image_{i}"]
            if not split_image_suffix(name)[1]:
                name += ".png"
            kind = str(example.get("collapsed_tag") or "")
            texts = _numbered(example[f"caption_{i}"])
            yield Record(f"{number}/{i}", name, texts, number, kind=kind)


def _colorswap(file: AnnotationFile) -> Iterator[Record]:
    """`test.json`: two images and two captions, with their colours swapped."""
    for number, example in enumerate(json.loads(file.text)):
        for i in (1, 2):
            texts = _numbered(example[f"caption_{i}"])
            yield Record(f"{number}/{i}", example[f"image_{i}"], texts, number)


def _cola(file: AnnotationFile) -> Iterator[Record]:
    """`COLA_multiobjects_matching_benchmark.json`: link, caption, link, caption of each example."""
    for number, (first, one, second, two) in enumerate(json.loads(file.text)):
        for i, (link, caption) in enumerate([(first, one), (second, two)]):
            name = PurePosixPath(link).name
            yield Record(f"{number}/{i}", name, _numbered(caption), number)


def _mmvp(file: AnnotationFile) -> Iterator[Record]:
    """`Questions.csv` of MMVP-VLM: questions 1 and 2 are a pair, images in a folder per type."""
    lines = csv.reader(io.StringIO(file.text))
    header = next(lines, [])
    if len(header) != len(("question", "type", "statement")):
        raise ValueError(f"its first line is {header}")
    for question, kind, statement in filter(None, lines):
        texts = _numbered(MMVP_PROMPT.format(statement))
        image = f"{kind}/{question}.jpg"
        yield Record(question, image, texts, (int(question) - 1) // 2, kind=kind)


def _sugarcrepe(file: AnnotationFile) -> Iterator[Record]:
    """`add_att.json` and its siblings: one image, its caption and a wrong one.

    SugarCrepe++ has the same names, and a second right caption.
    """
    document = json.loads(file.text)
    examples = document.items() if isinstance(document, dict) else enumerate(document)
    for number, example in examples:
        captions = _numbered(example["caption"], example["negative_caption"])
        if "caption2" in example:
            captions = {name: example[name] for name in ("caption", "caption2", "negative_caption")}
        kind = file.stem if file.is_one_of_several else ""
        yield Record(str(number), example["filename"], captions, int(number), kind=kind)


def _aro(file: AnnotationFile) -> Iterator[Record]:
    """`visual_genome_relation.json` and `…_attribution.json`: a box of an image, two captions."""
    for number, example in enumerate(json.loads(file.text)):
        left, top, width, height = (example[f"bbox_{side}"] for side in "xywh")
        box = round(left), round(top), round(left + width), round(top + height)  # as Pillow does
        sides = box[2] - box[0], box[3] - box[1]
        if min(sides) < 1 or max(math.prod(sides), *map(abs, box)) > MAX_BOX_PIXELS:
            raise ValueError(f"example {number} has the box {left, top, width, height}")
        captions = _numbered(example["true_caption"], example["false_caption"])
        yield Record(str(number), example["image_path"], captions, number, box)


def _numbered(*captions: str) -> dict[str, str]:
    return {str(i): text for i, text in enumerate(captions)}


def _without_suffix(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(""))


def _check_split(file: AnnotationFile, splits: set[str]) -> None:
    if file.split not in splits:
        raise ValueError(f"it has the splits {sorted(splits)}, and `split` is {file.split!r}")


FORMATS: Mapping[str, Callable[[AnnotationFile], Iterator[Record]]] = MappingProxyType(
    {
        "karpathy": _karpathy,
        "coco": _coco,
        "flickr30k": _flickr30k,
        "xm3600": _xm3600,
        "multi30k": _multi30k,
        "urban1k": _urban1k,
        "sharegpt4v": _sharegpt4v,
        "docci": _docci,
        "dci": _dci,
        "winoground": _winoground,
        "colorswap": _colorswap,
        "cola": _cola,
        "mmvp": _mmvp,
        "sugarcrepe": _sugarcrepe,
        "aro": _aro,
    }
)
