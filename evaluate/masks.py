"""Pictures with a mask of classes, as data sets for segmentation publish them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer
from PIL import Image

from evaluate.segmentation_sets import FOLDER, SEGMENTATION_SETS
from features.errors import EvaluationError
from features.images import DECODER_ERRORS, ImageFault, decode, open_image
from features.scenes.draw import BACKGROUND
from features.scenes.shards import PICTURE, WORLD_VERSION, members, sample
from features.scenes.world import CLASS_NAMES
from features.storage import files
from features.storage.place import Place

MOST_VALUES = 1 << 16
UNKNOWN, IGNORED = -2, -1


@dataclass(frozen=True)
class MaskClasses:
    """The classes that pixels can have."""

    names: tuple[tuple[str, ...], ...]
    """Of each class, its names."""
    values: tuple[int, ...]
    """Of each class, its value in the masks."""
    ignored: tuple[int, ...]
    """Values of pixels that do not count."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The first name of each class."""
        return tuple(names[0] for names in self.names)

    def labels(
        self, mask: Integer[np.ndarray, "height width"], place: object
    ) -> Int64[np.ndarray, "height width"]:
        """Turn the values of a mask into classes, -1 where a pixel does not count.

        Args:
            mask: As it was read.
            place: Where it was read, for the message.

        Raises:
            EvaluationError: It has a value that is of no class and not ignored.
        """
        table = np.full(MOST_VALUES + 1, UNKNOWN, dtype=np.int64)
        table[list(self.ignored)] = IGNORED
        table[list(self.values)] = np.arange(len(self.values))
        labels: np.ndarray = table[np.clip(mask, -1, MOST_VALUES)]  # beyond: the last, unknown
        if (labels == UNKNOWN).any():
            unknown = np.unique(mask[labels == UNKNOWN]).tolist()
            raise EvaluationError(
                f"The mask {place} has the value {unknown[0]}, which is of no class. One of the "
                f"{len(self.values)} values from {min(self.values)} to {max(self.values)}, or "
                f"{list(self.ignored)} for pixels that do not count, was expected. Correct "
                f"`classes`, or give masks of this data set."
            )
        return labels


def read_mask_classes(setting: str | Place) -> MaskClasses:
    """Read one of `SEGMENTATION_SETS`, or a JSON file of the user.

    Args:
        setting: The word, or the place of a file `{"classes": […], "values": […], "ignored": […]}`.
            A class is a name or a list of names. Its values are 0, 1, 2, … if not given, and 255
            is ignored.

    Raises:
        EvaluationError: The file cannot be read, or is not of this form.
    """
    place = FOLDER / f"{setting}.json" if setting in SEGMENTATION_SETS else setting
    try:
        document = json.loads(files.read(Path(place) if isinstance(place, str) else place))
        names = tuple(_names(each) for each in document["classes"])
        values = tuple(map(int, document.get("values", range(len(names)))))
        ignored = tuple(map(int, document.get("ignored", [255])))
        _check(names, values, ignored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"The classes {str(setting)!r} cannot be read: {error}. One of "
            f"{', '.join(SEGMENTATION_SETS)}, or a JSON file "
            f'{{"classes": ["sky", ["road", "street"]], "values": [0, 1], "ignored": [255]}} was '
            f"expected. Correct `classes` in [eval.segmentation]."
        ) from error
    return MaskClasses(names, values, ignored)


def _names(entry: Any) -> tuple[str, ...]:
    names = (entry,) if isinstance(entry, str) else tuple(entry)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"a class has the names {entry!r}")
    return names


def _check(names: Sequence[object], values: Sequence[int], ignored: Sequence[int]) -> None:
    if not names or len(names) != len(values):
        raise ValueError(f"there are {len(names)} classes and {len(values)} values")
    every = [*values, *ignored]
    if len(set(every)) != len(every):
        raise ValueError("a value stands twice")
    if not all(0 <= value < MOST_VALUES for value in every):
        raise ValueError(f"values from 0 to {MOST_VALUES - 1} are possible in a mask")


PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MASKS = frozenset({".png", ".bmp", ".tif", ".tiff"})  # a lossy format would change the classes
INDEXED = ("1", "L", "P", "I", "I;16")
NAMES_SHOWN = 3
MOST_PIXELS = PICTURE * PICTURE


@dataclass(frozen=True)
class Masked:
    """A picture and the class of each of its pixels."""

    name: str
    picture: Image.Image
    labels: Int64[np.ndarray, "height width"]
    """-1 where a pixel does not count."""


@runtime_checkable
class MaskedPictures(Protocol):
    """The pictures of a data set for segmentation; one is read at a time."""

    classes: MaskClasses
    names: tuple[str, ...]

    def read(self, name: str) -> Masked:
        """Read a picture and its mask."""

    def version(self) -> object:
        """Return plain data that change when a picture or a mask does."""


class FolderPictures:
    """Pictures and masks in two folders.

    Args:
        images: Folder of the pictures.
        masks: Folder of the masks; the settings say what all of this is.
        classes: A set that ships with the program, or a JSON file.
        names: File of the names that belong to the split; all if not given.
        pictures: How many to take; all if not given.
        max_pixels: Width times height of a picture that is still decoded.

    Raises:
        EvaluationError: There is none, a picture or a mask is missing, or two have the same name.
    """

    def __init__(
        self,
        images: Place,
        masks: Place,
        classes: str | Place,
        names: Place | None = None,
        pictures: int | None = None,
        *,
        max_pixels: int,
    ) -> None:
        self.classes = read_mask_classes(classes)
        self._pictures = _by_stem(images, PICTURES, "images")
        self._masks = _by_stem(masks, MASKS, "masks")
        self._max_pixels = max_pixels
        there = tuple(sorted(self._pictures.keys() | self._masks.keys()))
        named = there if names is None else _read_names(names)
        self._check(named, images, masks)
        self.names = named[:pictures]

    def read(self, name: str) -> Masked:
        """Read a picture and its mask.

        Raises:
            EvaluationError: One of them cannot be read, they differ in size, or the mask has a
                value that is of no class.
        """
        at, mask_at = self._pictures[name], self._masks[name]
        try:
            picture = decode(files.read(at), max_pixels=self._max_pixels)
        except (OSError, ImageFault) as error:
            raise _unreadable(at, error) from error
        mask = read_mask(files.read(mask_at), mask_at, max_pixels=self._max_pixels)
        if mask.shape != (picture.height, picture.width):
            raise EvaluationError(
                f"The mask {mask_at} has {mask.shape[1]} × {mask.shape[0]} pixels, its picture "
                f"{at} has {picture.width} × {picture.height}. The same size was expected. Put the "
                f"mask of this picture there."
            )
        return Masked(name, picture, self.classes.labels(mask, mask_at))

    def version(self) -> object:
        """Return sizes and times (or ETags) of all files."""
        return [
            [name, files.version(self._pictures[name]), files.version(self._masks[name])]
            for name in self.names
        ]

    def _check(self, named: tuple[str, ...], images: Place, masks: Place) -> None:
        for found, what, place in (
            (self._pictures, "picture", images),
            (self._masks, "mask", masks),
        ):
            if missing := [name for name in named if name not in found]:
                raise EvaluationError(
                    f"{len(missing)} of {len(named)} {what}s are not in {place}: "
                    f"{missing[:NAMES_SHOWN]}. A picture and a mask of the same name were "
                    f"expected for each. Correct `images` and `masks` in [eval.segmentation], or "
                    f"set `names` to the file that lists the split."
                )
        if not named:
            raise EvaluationError(
                f"There are no pictures in {images}. At least one, with a mask in "
                f"{masks}, was expected. Correct the folders in [eval.segmentation]."
            )


class ScenePictures:
    """Pictures of the demo world as its shards have them, drawn again with their masks."""

    def __init__(self, split: Literal["train", "test"], seed: int, pictures: int) -> None:
        names = tuple((name,) for name in CLASS_NAMES)
        self.classes = MaskClasses(names, tuple(range(len(names))), (BACKGROUND,))
        self.names = tuple(f"{row:06d}" for row in range(pictures))
        self._world = split, seed

    def read(self, name: str) -> Masked:
        """Draw a picture and its mask."""
        row = sample(*self._world, int(name))
        encoded = dict(members(row))
        picture = decode(encoded["jpg"], max_pixels=MOST_PIXELS)
        mask = read_mask(encoded["mask.png"], name, max_pixels=MOST_PIXELS)
        return Masked(name, picture, self.classes.labels(mask, name))

    def version(self) -> object:
        """Return what decides what is drawn."""
        return [WORLD_VERSION, *self._world, len(self.names)]


def read_mask(data: bytes, place: object, *, max_pixels: int) -> Int64[np.ndarray, "height width"]:
    """Read the values of a mask.

    Args:
        data: Of the file: greyscale of 8 or 16 bits, or a palette, of which the indices count.
        place: Where it was read, for the message.
        max_pixels: Width times height that is still decoded.

    Raises:
        EvaluationError: It cannot be read, or has colours instead of numbers.
    """
    try:
        mask = open_image(data, max_pixels=max_pixels)
        mask.load()
    except (*DECODER_ERRORS, ImageFault) as error:
        raise _unreadable(place, error) from error
    if mask.mode not in INDEXED:
        raise EvaluationError(
            f"The mask {place} has colours ({mask.mode}). The number of a class at each pixel was "
            f"expected: greyscale or a palette. Convert the masks, or take those with indices."
        )
    return np.asarray(mask).astype(np.int64)


def _by_stem(folder: Place, suffixes: frozenset[str], setting: str) -> Mapping[str, Place]:
    """Return the files of a folder by their names without suffix."""
    found: dict[str, Place] = {}
    for name in files.names(folder):
        path = PurePosixPath(name)
        if path.suffix.lower() not in suffixes or name.startswith("."):
            continue
        if path.stem in found:
            raise EvaluationError(
                f"{folder} has two files named {path.stem!r}, that differ in the suffix only. One "
                f"was expected. Remove one, or correct `{setting}` in [eval.segmentation]."
            )
        found[path.stem] = folder / name
    return found


def _read_names(place: Place) -> tuple[str, ...]:
    try:
        lines = files.read(place).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"The names {place} cannot be read ({error}). A text file with the name of a picture a "
            f"line, without suffix, was expected. Correct `names` in [eval.segmentation]."
        ) from error
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _unreadable(place: object, error: Exception) -> EvaluationError:
    return EvaluationError(
        f"{place} cannot be read: {error}. A whole image file was expected, since every picture "
        f"counts. Put a whole one there."
    )
