"""Settings of the evaluations."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from evaluate.segmentation_sets import SEGMENTATION_SETS
from features.config import SETTINGS, EachOnce, Name, PatchAttention
from features.storage.place import Place, PlaceSetting, as_place_setting

Names = Annotated[tuple[str, ...], EachOnce]
AlignmentMeasure = Literal["cka", "cka_debiased", "cka_rbf", "mutual_knn", "cknna", "svcca"]


def _classes(value: Any) -> str | Place:
    return value if value in SEGMENTATION_SETS else as_place_setting(value)


class _Segmentation(BaseModel):
    model_config = SETTINGS

    templates: tuple[str, ...] | str = "imagenet-1k"
    """Prompts for a class name, in the forms of `eval.templates`; the 80 of CLIP if not given."""
    synonyms: bool = True
    """A class takes the nearest of its names. `false`: its first name alone, as most published
    numbers have it."""
    attention: PatchAttention = "plain"
    """What the last block of the encoder attends to. `plain`: as it was trained. `maskclip`: each
    patch to itself. `qq`, `kk`, `vv`: by the similarity of queries, keys or values among
    themselves. `sclip`: queries and keys together. `clearclip`: queries, without the residual and
    the MLP of the block. Convolutional encoders have `plain` alone."""
    short: PositiveInt = 448
    """The shorter side of a picture is resized to this, its proportions kept."""
    longest: PositiveInt = 2048
    """The longer side is at most this."""
    crop: PositiveInt = 448
    """Side of the windows that the encoder sees, in pixels of the resized picture."""
    stride: PositiveInt = 224
    """From one window to the next."""
    pictures: PositiveInt | None = None
    """Take only the first pictures by name; all if not given."""

    @model_validator(mode="after")
    def _windows_leave_nothing_out(self) -> "_Segmentation":
        if self.stride > self.crop:
            raise ValueError(
                f"stride = {self.stride} is more than crop = {self.crop}, so that pixels between "
                f"the windows would not be seen. Give a stride of crop at most"
            )
        return self


class MaskFolder(_Segmentation):
    """Pictures and masks in two folders, joined by the names of their files without suffix."""

    kind: Literal["folder"]
    images: PlaceSetting
    """Folder of the pictures."""
    masks: PlaceSetting
    """Folder of the masks: PNG files whose values are numbers of classes, not colours."""
    classes: Annotated[str | Place, PlainValidator(_classes), PlainSerializer(str)]
    """`ade20k`, `coco-stuff`, `voc20` or `camvid` (docs/datasets.md), or a JSON file of your own
    `{"classes": ["sky", ["road", "street"]], "values": [0, 1], "ignored": [255]}`."""
    names: PlaceSetting | None = None
    """Text file with a name a line, where not all pictures of the folder belong to the split (VOC:
    `ImageSets/Segmentation/val.txt`); every picture must have a mask if not given."""


class SceneMasks(_Segmentation):
    """The bundled demo world, whose masks are known since it is drawn."""

    kind: Literal["scenes"]
    split: Literal["train", "test"]
    """Which part of the world."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drawing."""
    pictures: PositiveInt = 100
    """How many pictures to draw."""


SegmentationConfig = Annotated[MaskFolder | SceneMasks, Field(discriminator="kind")]


class CheckConfig(BaseModel):
    """What `sail eval --check` embeds anew, and how much drift it accepts."""

    model_config = SETTINGS

    rows: PositiveInt = 256
    """Rows, drawn by `eval.seed`."""
    tolerance: PositiveFloat = 1e-3
    """1 − the cosine of an embedding with itself, embedded in another way, at most."""


class EvalConfig(BaseModel):
    """Which measures are taken on which splits; each runs where a split has what it needs."""

    model_config = SETTINGS

    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of `sail align` to evaluate."""
    retrieval: Names = ()
    """Splits for image–text retrieval; every split but the training split, those with labels only
    and those with groups, if empty."""
    retrieval_fields: Names = ()
    """Caption fields that are searched; all if empty. Fields that have names rather than numbers
    are also scored one by one."""
    retrieval_positives: Literal["own", "identical"] = "own"
    """`own`: only an image's own captions are right (the usual protocol). `identical`: also those
    of other images with the same words, for captions that repeat."""
    zero_shot: Names = ()
    """Splits for zero-shot classification; every labelled split but the training split and those
    with groups, if empty."""
    templates: tuple[str, ...] | str = ("a photo of a {}.",)
    """Prompts for a class name; their embeddings are averaged. A list, the name of a data set whose
    prompts ship with the program (`imagenet-1k`: the 80 of CLIP; docs/datasets.md has all), or a
    JSON file `{"templates": […]}`."""
    split_templates: dict[str, tuple[str, ...] | str] = {}
    """Prompts for splits that have their own, in the same three forms."""
    knn: Names = ()
    """Splits for k-NN classification (queries); every labelled split with the classes of the
    reference but the training split, the reference and those with groups, if empty."""
    knn_reference: str | None = None
    """Labelled split whose rows vote; the training split if not given."""
    knn_k: Annotated[tuple[PositiveInt, ...], EachOnce] = (10, 20, 100, 200)
    """Numbers of neighbours that are tried."""
    knn_temperature: PositiveFloat = 0.07
    """T of the votes exp(cosine / T) (DINO)."""
    knn_search: Literal["exact", "ivf-pq"] = "exact"
    """`exact`: every query is compared with every row. `ivf-pq`: with those that a FAISS index of
    coarse codes finds, for millions of rows; the protocol has the share of the exact neighbours
    that it found."""
    linear_probe_rows: int = Field(default=0, ge=0)
    """Rows of `knn_reference` to which linear probes of the image features are fitted, at most; the
    splits of `knn` test them. 0 leaves them out: to converge takes minutes on a CPU."""
    alignment: Names = ()
    """Splits on whose pairs the alignment of image with text features is measured; every split with
    captions but the training split and those with groups, if empty."""
    alignment_measures: Annotated[tuple[AlignmentMeasure, ...], EachOnce] = (
        "cka",
        "cka_debiased",
        "mutual_knn",
        "cknna",
    )
    """Measures of alignment (docs/protocols.md); none if empty. `cka_rbf` and `svcca` take the
    longest."""
    alignment_rows: PositiveInt = 1024
    """Pairs, drawn by `seed`, on which alignment is measured, at most. Values of mutual k-NN and
    CKNNA depend on it: compare only values of as many."""
    alignment_held: PositiveInt = 4096
    """Where `alignment_rows` is more than this, so many pairs are held in memory: they ask for
    their neighbours among all (`mutual_knn`), and `cknna` and `cka_rbf`, which compare all pairs
    with all, are taken on them alone; `cka`, `cka_debiased` and `svcca` are of all pairs."""
    alignment_k: PositiveInt = 10
    """Neighbours of mutual k-NN and CKNNA; two at least for CKNNA."""
    alignment_permutations: int = Field(default=20, ge=0)
    """How often pairs are shuffled for the null of an alignment measure; 0 leaves it out."""
    alignment_subsamples: int = Field(default=20, ge=0)
    """Halves of the rows for its 95 % interval; fewer than two leave it out."""
    compositional: Names = ()
    """Splits with groups; every such split if empty."""
    compositional_fields: Names = ()
    """Caption fields that are compared; all in which the captions of a group differ if empty."""
    segmentation: dict[Name, SegmentationConfig] = {}
    """Data sets for open-vocabulary segmentation by name, each a section of its own."""
    check: CheckConfig = CheckConfig()
    """Of `sail eval --check`."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples for the 95 % intervals; 0 leaves them out."""
    examples: PositiveInt = 6
    """Right and wrong retrieval examples shown in the report, each; segmented pictures, of each
    data set."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resampling and of the choice of examples."""

    @model_validator(mode="after")
    def _cknna_has_neighbours(self) -> "EvalConfig":
        if self.alignment_k < 2 and "cknna" in self.alignment_measures:
            raise ValueError(
                "alignment_k = 1, but cknna needs two neighbours at least. Raise it, or leave "
                "cknna out of alignment_measures"
            )
        return self
