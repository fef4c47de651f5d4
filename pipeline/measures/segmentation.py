"""Open-vocabulary segmentation of data sets that have masks: these are read anew, not stored."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from evaluate.config import MaskFolder, SceneMasks
from evaluate.iou import Areas, mean_iou, pixel_confusion
from evaluate.items import Items
from evaluate.masks import Masked, MaskedPictures
from evaluate.overlays import SIDE, class_colours, hex_colour, overlay
from evaluate.pictures import thumbnail
from evaluate.results import Result
from evaluate.segmentation import Encode, Names, Sliding, fit_size, segment
from evaluate.segmentation_report import LegendEntry, SegmentedPicture
from evaluate.zero_shot import read_templates
from features.encoders.patches import PatchEncoder, patch_encoder
from features.errors import EvaluationError
from pipeline.embedding.rows import ROWS_AT_ONCE
from pipeline.interrupt import Stopped, StopRequest
from pipeline.measures.context import Context
from pipeline.progress import ProgressLine

FORMS = {
    "patch": "patch token",
    "cls+patch": "[class token of the window; patch token]",
    "patch+patch": "[patch token; patch token]",
}


@dataclass(frozen=True)
class _Task:
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
        return Sliding(crop, self.settings.stride, self.patches.patch, at_once)


def score_segmentation(
    context: Context, name: str, pictures: MaskedPictures, stop: StopRequest
) -> None:
    """Score a data set picture by picture; while one is segmented, the next is read.

    Args:
        context: The run.
        name: Section of `eval.segmentation`.
        pictures: The data set, opened.
        stop: Looked at after each picture.

    Raises:
        EncoderError: The image encoder has no patches, or no such attention.
        EvaluationError: A picture or mask cannot be used, or no pixel counts.
        Stopped: A signal came.
    """
    settings = context.config.eval.segmentation[name]
    aligned = context.aligned
    patches = patch_encoder(aligned.image_encoder, aligned.image_column, settings.attention)
    task = _Task(
        context, name, settings, pictures, patches, _class_names(context, settings, pictures)
    )
    classes, count = len(pictures.classes.names), len(pictures.names)
    generator = np.random.default_rng(context.config.eval.seed)
    chosen = generator.choice(count, min(context.config.eval.examples, count), replace=False)
    areas = np.zeros((3, count, classes), dtype=np.int64)
    with ProgressLine(f"segment {name}", count, "pictures") as line:
        for number, (masked, predicted) in enumerate(_segmented(task)):
            confusion = pixel_confusion(masked.labels, predicted, classes)
            areas[:, number] = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
            if number in chosen:
                context.findings.segmented.append(_example(task, masked, predicted))
            line.advance(1)
            if stop():
                raise Stopped
    _add_results(task, Areas(*areas))


def _class_names(
    context: Context, settings: MaskFolder | SceneMasks, pictures: MaskedPictures
) -> Names:
    """Embed the prompts of all names of all classes."""
    wanted = [
        (name, number)
        for number, names in enumerate(pictures.classes.names)
        for name in (names if settings.synonyms else names[:1])
    ]
    embeddings = context.class_embeddings(
        [name for name, _ in wanted], read_templates(settings.templates)
    )
    owners = torch.tensor([owner for _, owner in wanted], device=embeddings.device)
    return Names(embeddings, owners)


def _segmented(task: _Task) -> Iterator[tuple[Masked, Int64[np.ndarray, "height width"]]]:
    """Yield each picture with the class of each of its pixels."""
    encode, names = _aligned_patches(task), task.pictures.names

    def read(name: str) -> tuple[Masked, UInt8[Tensor, "3 height width"]]:
        masked = task.pictures.read(name)
        height, width = masked.labels.shape
        fitted = fit_size(height, width, short=task.settings.short, longest=task.settings.longest)
        resample = task.patches.encoder.preprocessing.resample
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


def _aligned_patches(task: _Task) -> Encode:
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


def _add_results(task: _Task, areas: Areas) -> None:
    context, classes = task.context, task.pictures.classes
    right, scored = areas.right.sum(axis=1), areas.true.sum(axis=1)
    if not scored.sum():
        raise EvaluationError(
            f"No pixel of eval.segmentation.{task.name} counts: all have the values "
            f"{list(classes.ignored)}. Pixels of the classes were expected. Correct `classes`."
        )
    iou, settings = areas.iou(), context.config.eval
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
    accuracy = made(
        dataset=task.name,
        metric="pixel_accuracy",
        value=float(right.sum() / scored.sum()),
        n=len(scored),
        ci95=context.interval(right, scored),
        protocol=protocol
        | {"chance": 1 / len(iou), "majority_class": frequent / int(scored.sum())},
    )
    context.findings.items[accuracy.name] = Items(right, scored)
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
    context.findings.results += [miou, accuracy, *of_classes]
    if missing := len(iou) - len(of_classes):
        context.findings.note(
            f"{missing} of {len(iou)} classes of {task.name} are in no mask and no prediction, and "
            f"do not count in its mean IoU."
        )


def _protocol(task: _Task) -> dict[str, object]:
    """Return what could change the numbers of a data set."""
    settings, preprocessing = task.settings, task.patches.encoder.preprocessing
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
    task: _Task, masked: Masked, predicted: Int64[np.ndarray, "height width"]
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
