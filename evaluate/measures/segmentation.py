"""Open-vocabulary segmentation of data sets that have masks: these are read anew, not stored."""

import colorsys
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from pydantic import (
    BaseModel,
    Field,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    model_validator,
)

from evaluate.config import EvalSettings
from evaluate.examples import thumbnail
from evaluate.measures.measure import Context, Inputs, Measure, Splits, Tensor
from evaluate.prompts import make_prompts, read_templates
from evaluate.results import Findings, Items, Result
from evaluate.segmentation_sets import SEGMENTATION_SETS
from features.config import (
    SETTINGS,
    DataPlace,
    Name,
    PatchAttention,
    Templates,
    name_or_place,
)
from features.errors import EvaluationError
from features.storage.place import Place

if TYPE_CHECKING:
    from evaluate.masks import Masked, MaskedPictures
    from evaluate.segmentation import Areas, Names, Sliding
    from features.encoders.patches import PatchEncoder
else:
    Areas = Names = Sliding = Masked = MaskedPictures = PatchEncoder = Any

SIDE = 300
OPAQUE = 0.7
GOLDEN_ANGLE = 0.381966  # of a turn: hues of any number of classes stay apart
LIGHTNESS = (0.42, 0.6, 0.3)
SATURATION = 0.75


def class_colours(num_classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Return a colour for each class, the same for the same number of the class always."""
    colours = [
        colorsys.hls_to_rgb(number * GOLDEN_ANGLE % 1, LIGHTNESS[number % 3], SATURATION)
        for number in range(num_classes)
    ]
    rounded: np.ndarray = np.rint(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)
    return rounded


def overlay(
    picture: Image.Image,
    labels: Int64[np.ndarray, "height width"],
    colours: UInt8[np.ndarray, "classes 3"],
) -> str:
    """Return a picture with its classes painted over it, as a data URI.

    Args:
        picture: Of the size of the labels.
        labels: Classes; where they are -1, the picture is shown grey and dark.
        colours: Of the classes.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    painted = OPAQUE * colours[labels] + (1 - OPAQUE) * grey
    shown = np.where(labels[..., None] >= 0, painted, 0.4 * grey)
    return thumbnail(Image.fromarray(shown.astype(np.uint8)), side=SIDE)


def hex_colour(colour: UInt8[np.ndarray, "3"]) -> str:
    """Return a colour as CSS has it."""
    return "#" + "".join(f"{part:02x}" for part in colour.tolist())


FORMS = {
    "patch": "patch token",
    "cls+patch": "[class token of the window; patch token]",
    "patch+patch": "[patch token; patch token]",
}


class _Segmentation(BaseModel):
    model_config = SETTINGS

    templates: Templates = "imagenet-1k"
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
    images: DataPlace
    """Folder of the pictures."""
    masks: DataPlace
    """Folder of the masks: PNG files whose values are numbers of classes, not colours."""
    classes: Annotated[
        str | Place, PlainValidator(name_or_place(SEGMENTATION_SETS)), PlainSerializer(str)
    ]
    """`ade20k`, `coco-stuff`, `voc20` or `camvid` (docs/datasets.md), or a JSON file of your own
    `{"classes": ["sky", ["road", "street"]], "values": [0, 1], "ignored": [255]}`."""
    names: DataPlace | None = None
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


class SegmentationSettings(EvalSettings):
    """Settings of segmentation."""

    segmentation: dict[Name, SegmentationConfig] = Field(default={})
    """Data sets for open-vocabulary segmentation by name, each a section of its own."""


class Segmentation(Measure):
    """Mean IoU of the class that is nearest to the patches of each pixel."""

    name = "segmentation"
    title = "Open-vocabulary segmentation"
    in_short = "Each pixel's class from the names alone: mean IoU"
    explained = (
        "Every pixel takes the class whose name is nearest to the part of the picture it lies in; "
        "no mask was ever learned from. **iou** of a class is the area that is right, divided by "
        "the area that is of the class or was taken for it, over all pictures; **miou** is its "
        "mean over the classes, small ones like large ones, **pixel accuracy** counts pixels. "
        "**One class everywhere** is what the most frequent class would score if every pixel took "
        "it."
    )
    method = (
        "Windows slide over the resized picture; the cosines of their patches with the names are "
        "enlarged to the mask’s size, and every pixel takes the nearest. Pixels that the masks "
        "leave open do not count."
    )
    metric = "miou"
    settings = SegmentationSettings
    sections: ClassVar = {
        '[eval.segmentation.NAME] with kind = "folder"': MaskFolder,
        '[eval.segmentation.NAME] with kind = "scenes"': SceneMasks,
    }
    needs = "data sets with masks"
    template = "segmentation.html.j2"

    def mentions(self, settings: EvalSettings) -> dict[str, Sequence[str]]:  # noqa: ARG002
        """Return none: its data sets are no splits."""
        return {}

    def splits(self, settings: EvalSettings, splits: Splits) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the data sets."""
        return tuple(settings.of(SegmentationSettings).segmentation)

    def inputs(self, settings: EvalSettings, max_pixels: int) -> Mapping[str, Inputs]:
        """Open the data sets.

        Raises:
            EvaluationError: The files of one are not there, or not all.
        """
        from evaluate.masks import FolderPictures, ScenePictures

        opened: dict[str, Inputs] = {}
        for name, config in settings.of(SegmentationSettings).segmentation.items():
            if isinstance(config, SceneMasks):
                opened[name] = ScenePictures(config.split, config.seed, config.pictures)
            else:
                opened[name] = FolderPictures(
                    config.images,
                    config.masks,
                    config.classes,
                    config.names,
                    config.pictures,
                    max_pixels=max_pixels,
                )
        return opened

    def run(self, context: Context, split: str) -> Findings:
        """Score a data set picture by picture; while one is segmented, the next is read.

        Raises:
            EncoderError: The image encoder has no patches, or no such attention.
            EvaluationError: A picture or mask cannot be used, or no pixel counts.
        """
        from evaluate.segmentation import Areas, pixel_confusion
        from features.encoders.patches import patch_encoder

        found, pictures = Findings(), context.inputs[self.name][split]
        settings = context.settings.of(SegmentationSettings).segmentation[split]
        patches = patch_encoder(*context.image_encoder(), settings.attention)
        names = _class_names(context, settings, pictures)
        task = _Segmented(context, split, settings, pictures, patches, names)
        classes, count = len(pictures.classes.names), len(pictures.names)
        generator = np.random.default_rng(context.settings.seed)
        chosen = generator.choice(count, min(context.settings.examples, count), replace=False)
        areas = np.zeros((3, count, classes), dtype=np.int64)
        with context.progress(f"segment {split}", count, "pictures") as line:
            for number, (masked, predicted) in enumerate(_segmented(task)):
                confusion = pixel_confusion(masked.labels, predicted, classes)
                areas[:, number] = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
                if number in chosen:
                    found.exhibits.append(_example(task, masked, predicted))
                line.advance(1)
                context.check_stop()
        _add_results(task, found, Areas(*areas))
        return found

    def view(self, results: Sequence[Result], exhibits: Sequence[Any]) -> dict[str, Any]:
        """Return the numbers and pictures of each data set."""
        return {"views": segmentation_views(results, exhibits)}


@dataclass(frozen=True)
class LegendEntry:
    """A class of a segmented picture."""

    colour: str
    """As CSS has it."""
    name: str
    is_there: bool
    is_predicted: bool


@dataclass(frozen=True)
class SegmentedPicture:
    """A picture, its mask, and what was predicted."""

    dataset: str
    name: str
    picture: str
    """Data URI, as the next two."""
    truth: str
    prediction: str
    accuracy: float | None
    """Fraction of its pixels that are right; None where none counts."""
    legend: tuple[LegendEntry, ...]


@dataclass(frozen=True)
class SegmentationView:
    """The numbers and pictures of a data set."""

    dataset: str
    scores: list[Result]
    classes: list[Result]
    """IoU of each class, best first."""
    pictures: list[SegmentedPicture]


def segmentation_views(
    results: Sequence[Result], pictures: Sequence[SegmentedPicture]
) -> list[SegmentationView]:
    """Gather the numbers and pictures of each segmented data set."""
    return [
        SegmentationView(
            name,
            [each for each in results if each.dataset == name],
            sorted(
                (each for each in results if each.is_detail and each.split == name),
                key=lambda each: -each.value,
            ),
            [each for each in pictures if each.dataset == name],
        )
        for name in dict.fromkeys(each.split for each in results)
    ]


@dataclass(frozen=True)
class _Segmented:
    """A data set, and what it takes to segment it."""

    context: Context
    name: str
    settings: MaskFolder | SceneMasks
    pictures: MaskedPictures
    patches: PatchEncoder
    names: Names

    @property
    def sliding(self) -> Sliding:
        """The windows, of which as many pixels are encoded at once as in extraction."""
        encoder, crop = self.patches.encoder, self.settings.crop
        height, width = encoder.preprocessing.output_size
        at_once = max(1, encoder.batch_size * height * width // crop**2)
        from evaluate.segmentation import Sliding

        return Sliding(crop, self.settings.stride, self.patches.patch, at_once)


def _class_names(
    context: Context, settings: MaskFolder | SceneMasks, pictures: MaskedPictures
) -> Names:
    """Embed the prompts of all names of all classes."""
    wanted = [
        (name, number)
        for number, names in enumerate(pictures.classes.names)
        for name in (names if settings.synonyms else names[:1])
    ]
    templates = read_templates(settings.templates)
    embeddings = context.class_embeddings(make_prompts([name for name, _ in wanted], templates))
    import torch

    from evaluate.segmentation import Names

    owners = torch.tensor([owner for _, owner in wanted], device=embeddings.device)
    return Names(embeddings, owners)


def _segmented(task: _Segmented) -> Iterator[tuple[Masked, Int64[np.ndarray, "height width"]]]:
    """Yield each picture with the class of each of its pixels."""
    import torch

    from evaluate.segmentation import fit_size, segment

    encode, names = _aligned_patches(task), task.pictures.names

    def read(name: str) -> tuple[Masked, UInt8[Tensor, "3 height width"]]:
        masked = task.pictures.read(name)
        height, width = masked.labels.shape
        fitted = fit_size(height, width, short=task.settings.short, longest=task.settings.longest)
        resample = task.patches.preprocessing.resample
        resized = masked.picture.resize(fitted[::-1], resample, reducing_gap=None)
        return masked, torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy())

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, names[0])
        for following in (*names[1:], None):
            masked, pixels = coming.result()
            if following is not None:
                coming = pool.submit(read, following)
            image, size = task.patches.normalise(pixels), masked.labels.shape
            predicted = segment(image, encode, task.names, task.sliding, (size[0], size[1]))
            yield masked, predicted.cpu().numpy()


def _aligned_patches(task: _Segmented) -> Callable[[Tensor], Tensor]:
    import torch

    from evaluate.embedder import ROWS_AT_ONCE

    embed = task.context.embedder.model.embed_image

    def encode(
        windows: Float[Tensor, "windows 3 height width"],
    ) -> Float[Tensor, "windows rows columns dim"]:
        features = task.patches.encode(windows)
        rows = features.flatten(0, 2)
        parts = [
            embed(rows[start : start + ROWS_AT_ONCE]) for start in range(0, len(rows), ROWS_AT_ONCE)
        ]
        return torch.cat(parts).view(*features.shape[:3], -1).float()

    return encode


def _add_results(task: _Segmented, found: Findings, areas: Areas) -> None:
    from evaluate.segmentation import mean_iou

    context, classes = task.context, task.pictures.classes
    right, scored = areas.right.sum(axis=1), areas.true.sum(axis=1)
    if not scored.sum():
        raise EvaluationError(
            f"No pixel of eval.segmentation.{task.name} counts: all have the values "
            f"{list(classes.ignored)}. Pixels of the classes were expected. Correct `classes`."
        )
    iou, settings = areas.iou(), context.settings
    whole, each = areas.intervals(resamples=settings.bootstrap, seed=settings.seed)
    made = partial(Result, task="segmentation", encoders=context.encoders)
    protocol, frequent = _protocol(task), int(areas.true.sum(axis=0).max())
    miou = made(
        dataset=task.name,
        metric="miou",
        value=mean_iou(iou),
        n=len(scored),
        ci95=whole,
        protocol=protocol
        | {"chance": areas.random_class(), "majority_class": areas.majority_class()},
    )
    found.add(miou)
    context.add(
        found,
        Items(right, scored),
        task="segmentation",
        dataset=task.name,
        metric="pixel_accuracy",
        protocol=protocol
        | {"chance": 1 / len(iou), "majority_class": frequent / int(scored.sum())},
    )
    there = (areas.true > 0).sum(axis=0)
    of_classes = [
        made(
            dataset=f"{task.name}/{classes.shown[number]}",
            metric="iou",
            value=float(iou[number]),
            n=int(there[number]),
            ci95=each[number],
            protocol=protocol,
        )
        for number in np.flatnonzero(np.isfinite(iou))
    ]
    found.results += of_classes
    if missing := len(iou) - len(of_classes):
        found.note(
            f"{missing} of {len(iou)} classes of {task.name} are in no mask and no prediction, and "
            f"do not count in its mean IoU."
        )


def _protocol(task: _Segmented) -> dict[str, object]:
    """Return what could change the numbers of a data set."""
    settings, preprocessing = task.settings, task.patches.preprocessing
    names = "\n".join(task.pictures.names)
    return {
        "templates": list(read_templates(settings.templates)),
        "classes": len(task.pictures.classes.names),
        "names": len(task.names.owners),
        "ignored": list(task.pictures.classes.ignored),
        "patch_feature": FORMS[task.patches.form],
        "attention": settings.attention,
        "patch": task.patches.patch,
        "short": settings.short,
        "longest": settings.longest,
        "crop": settings.crop,
        "stride": settings.stride,
        "resample": preprocessing.as_dict()["resample"],
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "rows_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


def _example(
    task: _Segmented, masked: Masked, predicted: Int64[np.ndarray, "height width"]
) -> SegmentedPicture:
    classes = task.pictures.classes
    colours = class_colours(len(classes.names))
    counts = masked.labels >= 0
    there = np.unique(masked.labels[counts])
    taken = np.unique(predicted[counts])
    return SegmentedPicture(
        dataset=task.name,
        name=masked.name,
        picture=thumbnail(masked.picture, side=SIDE),
        truth=overlay(masked.picture, masked.labels, colours),
        prediction=overlay(masked.picture, np.where(counts, predicted, -1), colours),
        accuracy=float((predicted == masked.labels)[counts].mean()) if counts.any() else None,
        legend=tuple(
            LegendEntry(
                hex_colour(colours[number]), classes.shown[number], number in there, number in taken
            )
            for number in np.union1d(there, taken)
        ),
    )
