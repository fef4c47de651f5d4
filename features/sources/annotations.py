"""Standard annotation files of retrieval and compositional benchmarks, beside their images.

Each format is a function that gives one record per row: an image, its captions, and the number of
its compositional example. Of a group of two rows, image i belongs to caption i; of a group of one
row, the caption in field 0 is right and the others are not.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Literal

from pydantic import PositiveInt, model_validator

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
from features.sources.captions import as_text
from features.sources.image_folder import FoundImage, ImageFolder, place_image
from features.sources.text import lines_of
from features.storage import files
from features.storage.files import is_file
from features.storage.parallel import in_order
from features.storage.place import Place

MMVP_PROMPT = "a photo of {}"
"""What MMVP-VLM's own script puts around a statement."""

NOT_OF_THE_FORMAT = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    csv.Error,
)
MAX_BOX_PIXELS = 1 << 26
"""Room for a box of any photograph, but not for all memory there is."""

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
    captions: tuple[str, ...]
    group: int = -1
    box: Sequence[int] | None = None
    """The part of the image that the row is of: left, top, right and bottom in pixels."""


class AnnotationSource(SourceSettings):
    """The annotation file of a known benchmark, as its authors publish it (docs/datasets.md)."""

    kind: Literal["annotations"]
    path: DataPlace
    """The annotation file."""
    format: Literal["karpathy", "coco", "flickr30k", "winoground", "mmvp", "sugarcrepe", "aro"]
    """`karpathy`: `dataset_coco.json`, `dataset_flickr30k.json`. `coco`: `captions_val2017.json`.
    `flickr30k`: its `.token` or `results.csv`. `winoground`: `examples.jsonl`. `mmvp`:
    `Questions.csv` of MMVP-VLM. `sugarcrepe`: `add_att.json` and its siblings. `aro`:
    `visual_genome_relation.json`, `visual_genome_attribution.json`."""
    images: DataPlace | None = None
    """Folder that the names of the images are relative to; that of the file if not given."""
    split: str = "test"
    """Which split of a `karpathy` file; the other formats have none."""
    captions_per_image: PositiveInt = 5
    """Captions of an image beyond the first so many are left out, as is usual in retrieval."""

    unused = frozenset({"captions", "label", "group", "class_names"})

    @model_validator(mode="after")
    def _settings_are_of_the_format(self) -> "AnnotationSource":
        read = {"split": ("karpathy",), "captions_per_image": ("karpathy", "coco", "flickr30k")}
        for name, formats in read.items():
            is_default = getattr(self, name) == type(self).model_fields[name].default
            if self.format not in formats and not is_default:
                raise ValueError(
                    f"`{name}` has no effect on format {self.format!r}, but on "
                    f"{', '.join(formats)}; take it out"
                )
        return self

    def _open(self, known: Known) -> "Annotations":
        if not is_file(self.path):
            raise SourceError(
                f"There is no file {self.path}. The annotations of {self.format} were expected. "
                f"Correct `path` of the source; `sail settings annotations` says which file it is."
            )
        return Annotations(self, [self.path], known)


class Annotations(SourceReader[AnnotationSource]):
    """Lists one sample per row of a benchmark; its format says where the captions are."""

    has_captions = False

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield one sample per row of the benchmark.

        Raises:
            SourceError: The file is not of the format, or names an image elsewhere.
        """
        keys = self.keys(file, counts)
        folder = self.source.images or file.parent
        images = ImageFolder(folder, file)

        def find(record: Record) -> tuple[Record, FoundImage]:
            return record, images.find(record.image)

        for record, found in in_order(find, self._records(file, counts), at=folder):
            key, problem = keys.of(record.key)
            sample = Sample(key, problem=problem, group=record.group, box=record.box)
            texts = (as_text(text, counts) for text in record.captions)
            sample.captions = {str(i): text for i, text in enumerate(texts)}
            place_image(sample, found, images, self, counts)
            yield sample

    def _records(self, file: Place, counts: Counts) -> Iterator[Record]:
        source = self.source
        try:
            text = files.read(file).decode("utf-8-sig")
            yield from FORMATS[source.format](text, source, counts)
        except NOT_OF_THE_FORMAT as error:
            raise SourceError(
                f"{file} cannot be read as annotations of {source.format}: {type(error).__name__} "
                f"{error}. Correct `path` or `format` of the source; `sail settings annotations` "
                f"says which file of its authors each format is."
            ) from error


def _karpathy(text: str, source: AnnotationSource, _: Counts) -> Iterator[Record]:
    """`dataset_coco.json`, `dataset_flickr30k.json`: captions under `sentences`, with a split."""
    images = json.loads(text)["images"]
    splits = sorted({image["split"] for image in images})
    if source.split not in splits:
        raise ValueError(f"it has the splits {splits}, and `split` is {source.split!r}")
    for image in images:
        if image["split"] == source.split:
            path = PurePosixPath(image.get("filepath", ""), image["filename"])
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield _described(str(path), captions, source)


def _coco(text: str, source: AnnotationSource, counts: Counts) -> Iterator[Record]:
    """`captions_val2017.json`: images and captions apart, joined by id, in order of the image."""
    document = json.loads(text)
    captions: dict[int, list[str]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        if not isinstance(annotation.get("caption"), str):
            counts["annotations without a caption (ignored)"] += 1
        elif annotation["image_id"] in captions:
            captions[annotation["image_id"]].append(annotation["caption"])
        else:
            counts["captions of images that the file does not list (ignored)"] += 1
    if document["annotations"] and not any(captions.values()):
        raise ValueError("none of its annotations is a caption, as in those of boxes")
    for image in sorted(document["images"], key=lambda image: int(image["id"])):
        yield _described(image["file_name"], captions[image["id"]], source)


def _flickr30k(text: str, source: AnnotationSource, _: Counts) -> Iterator[Record]:
    """`results_20130124.token` (name#number, a tab, caption) or `results.csv` (with ` | `)."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(filter(str.strip, lines_of(text)), 1):
        found = FLICKR_LINE.fullmatch(line.strip())
        if found:
            captions.setdefault(found["image"], []).append(found["caption"])
        elif number > 1 or not line.startswith("image_name"):  # the header of the .csv
            raise ValueError(f"line {number} is {line!r}")
    for name, texts in captions.items():
        yield _described(name, texts, source)


def _winoground(text: str, _: AnnotationSource, __: Counts) -> Iterator[Record]:
    """`examples.jsonl`: two images, named without suffix by their authors, and two captions."""
    examples = map(json.loads, filter(str.strip, lines_of(text)))
    for number, example in enumerate(examples):  # an `id` may come again in files made like it
        for i in range(2):
            name = example[f"image_{i}"]
            if not split_image_suffix(name)[1]:
                name += ".png"
            caption = (example[f"caption_{i}"],)
            yield Record(f"{number}/{i}", name, caption, number)


def _mmvp(text: str, _: AnnotationSource, __: Counts) -> Iterator[Record]:
    """`Questions.csv` of MMVP-VLM: questions 1 and 2 are a pair, images in a folder per type."""
    lines = csv.reader(io.StringIO(text))
    header = next(lines)
    if len(header) != len(("question", "type", "statement")):
        raise ValueError(f"its first line is {header}")
    for question, kind, statement in filter(None, lines):
        caption = MMVP_PROMPT.format(statement)
        yield Record(question, f"{kind}/{question}.jpg", (caption,), (int(question) - 1) // 2)


def _sugarcrepe(text: str, _: AnnotationSource, __: Counts) -> Iterator[Record]:
    """`add_att.json` and its six siblings: one image, its caption and a wrong one."""
    for number, example in json.loads(text).items():
        captions = (example["caption"], example["negative_caption"])
        yield Record(number, example["filename"], captions, int(number))


def _aro(text: str, _: AnnotationSource, __: Counts) -> Iterator[Record]:
    """`visual_genome_relation.json` and `…_attribution.json`: a box of an image, two captions."""
    for number, example in enumerate(json.loads(text)):
        left, top, width, height = (example[f"bbox_{side}"] for side in "xywh")
        box = round(left), round(top), round(left + width), round(top + height)  # as Pillow does
        sides = box[2] - box[0], box[3] - box[1]
        if min(sides) < 1 or max(math.prod(sides), *map(abs, box)) > MAX_BOX_PIXELS:
            raise ValueError(f"example {number} has the box {left, top, width, height}")
        captions = (example["true_caption"], example["false_caption"])
        yield Record(str(number), example["image_path"], captions, number, box)


def _described(image: str, captions: list[str], source: AnnotationSource) -> Record:
    key = str(PurePosixPath(image).with_suffix(""))
    return Record(key, image, tuple(captions[: source.captions_per_image]))


Format = Callable[[str, AnnotationSource, Counts], Iterator[Record]]
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "karpathy": _karpathy,
        "coco": _coco,
        "flickr30k": _flickr30k,
        "winoground": _winoground,
        "mmvp": _mmvp,
        "sugarcrepe": _sugarcrepe,
        "aro": _aro,
    }
)
