"""Standard annotation files of retrieval and compositional benchmarks, beside their images."""

import csv
from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt, model_validator

from features.config import DataPattern, DataPlace
from features.errors import SourceError
from features.sources.annotation_formats import FORMATS, AnnotationFile, Record
from features.sources.base import Counts, Known, Sample, SourceReader, SourceSettings
from features.sources.captions import as_text
from features.sources.image_folder import FoundImage, ImageFolder, place_image
from features.storage.files import matching_places
from features.storage.parallel import in_order
from features.storage.place import Place

NOT_OF_THE_FORMAT = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    csv.Error,
)


class AnnotationSource(SourceSettings):
    """The annotation file of a known benchmark, as its authors publish it (docs/datasets.md)."""

    kind: Literal["annotations"]
    path: DataPattern | tuple[DataPattern, ...]
    """The annotation file; pattern(s) of files of one format, each a part that is scored apart."""
    format: Literal[
        "karpathy",
        "coco",
        "flickr30k",
        "xm3600",
        "multi30k",
        "urban1k",
        "sharegpt4v",
        "docci",
        "dci",
        "winoground",
        "colorswap",
        "cola",
        "mmvp",
        "sugarcrepe",
        "aro",
    ]
    """`karpathy`: `dataset_coco.json`, `dataset_flickr30k.json`. `coco`: `captions_val2017.json`.
    `flickr30k`: its `.token` or `results.csv`. `xm3600`: `captions.jsonl`. `multi30k`:
    `image_splits/test_2016_flickr.txt`, with `raw` beside. `urban1k`: `caption/*.txt`.
    `sharegpt4v`: `share-captioner_coco_lcs_sam_1246k_1107.json`. `docci`:
    `docci_descriptions.jsonlines`. `dci`: `complete/*.json`. `winoground`: `examples.jsonl`.
    `colorswap`: `test.json`. `cola`: `COLA_multiobjects_matching_benchmark.json`. `mmvp`:
    `Questions.csv` of MMVP-VLM. `sugarcrepe`: `add_att.json` and its siblings, those of
    SugarCrepe++ too. `aro`: `visual_genome_relation.json`, `visual_genome_attribution.json`."""
    images: DataPlace | None = None
    """Folder that the names of the images are relative to; that of the file if not given."""
    split: str = "test"
    """Which split of a `karpathy` or `docci` file; the other formats have none."""
    captions_per_image: PositiveInt = 5
    """Captions of an image beyond the first so many are left out, as is usual in retrieval."""

    unused = frozenset({"captions", "label", "group", "class_names"})

    @model_validator(mode="after")
    def _settings_are_of_the_format(self) -> "AnnotationSource":
        read = {
            "split": ("karpathy", "docci"),
            "captions_per_image": ("karpathy", "coco", "flickr30k"),
        }
        for name, formats in read.items():
            is_default = getattr(self, name) == type(self).model_fields[name].default
            if self.format not in formats and not is_default:
                raise ValueError(
                    f"`{name}` has no effect on format {self.format!r}, but on "
                    f"{', '.join(formats)}; take it out"
                )
        return self

    def _open(self, known: Known) -> "Annotations":
        patterns = [self.path] if isinstance(self.path, str) else self.path
        try:
            found = [place for pattern in patterns for place in matching_places(pattern)]
        except FileNotFoundError as error:
            raise SourceError(
                f"There is no file {error}. The annotations of {self.format} were expected. "
                f"Correct `path` of the source; `sail settings annotations` says which file it is."
            ) from error
        return Annotations(self, found, known)


class Annotations(SourceReader[AnnotationSource]):
    """Lists one sample per row of a benchmark; its format says where the captions are.

    The parts that its authors score apart are the labels of the samples.
    """

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
            sample = Sample(key, problem=problem, box=record.box, label_name=record.kind)
            if len(self.files) > 1 and record.group >= 0:
                sample.group_name = f"{self.files[file]}/{record.group}"
            else:
                sample.group = record.group
            sample.captions = {
                name: as_text(text, counts) for name, text in record.captions.items()
            }
            place_image(sample, found, images, self, counts)
            yield sample

    def _records(self, file: Place, counts: Counts) -> Iterator[Record]:
        source, several = self.source, len(self.files) > 1
        about = AnnotationFile(file, source.split, source.captions_per_image, counts, several)
        try:
            for record in FORMATS[source.format](about):
                wrong = [each for each in record.captions.values() if type(each) is not str]
                if wrong:
                    raise ValueError(f"{record.key!r} has the caption {wrong[0]!r:.80}")
                yield record
        except NOT_OF_THE_FORMAT as error:
            raise SourceError(
                f"{file} cannot be read as annotations of {source.format}: {type(error).__name__} "
                f"{error}. Correct `path` or `format` of the source; `sail settings annotations` "
                f"says which file of its authors each format is."
            ) from error
