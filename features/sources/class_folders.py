"""One folder of images per class (ImageFolder)."""

import json
import logging
import os
from collections.abc import Iterator, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from features.class_lists import read_class_list
from features.config import ClassNames, DataPlace
from features.errors import SourceError
from features.sources.base import (
    Counts,
    Known,
    Sample,
    SourceReader,
    SourceSettings,
    is_left_behind,
    split_image_suffix,
)
from features.storage import files
from features.storage.place import Place

logger = logging.getLogger(__name__)
NAMES_SHOWN = 5


class ClassFolderSource(SourceSettings):
    """One folder of images per class (ImageFolder); the sorted folder names are the labels."""

    class_names: ClassNames | None = None
    """Gives folders a readable class name, by their names: a list that ships with the program, such
    as `imagenet-1k` (docs/datasets.md has all), or a JSON file `{"folders": […], "classes": […]}`.
    A part of the folders of a list will do; others are refused. Run files may also call it `names`,
    as it was earlier."""
    kind: Literal["classes"]
    path: DataPlace
    """Folder that holds one folder per class."""

    unused = frozenset({"captions", "label", "group"})

    @model_validator(mode="before")
    @classmethod
    def _take_earlier_name(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or "names" not in settings:
            return settings
        others = {name: value for name, value in settings.items() if name != "names"}
        if others.get("class_names") is not None and settings["names"] is not None:
            raise ValueError("`names` is the earlier name of `class_names`; give one of them")
        return others | {"class_names": others.get("class_names") or settings["names"]}

    def _open(self, known: Known) -> "ClassFolders":
        children = files.children(self.path)
        folders = [name for name, size in children if size is None]
        places = [self.path / name for name in folders if not is_left_behind(name)]
        found = [place for place in places if place in known or _has_images(place)]
        if not found:
            without = f" with images; it has {folders[:NAMES_SHOWN]}" if folders else ""
            one_below = (
                place
                for place in places
                for name, size in files.children(place)
                if size is None and _has_images(place / name)
            )
            if (below := next(one_below, None)) is not None:
                without += f", and in {below} there are such folders"
            raise SourceError(
                f"{self.path} has no folders{without}. One folder of images per class was "
                f"expected, the images right in it. Correct `path` of the source."
            )
        if left_out := len(folders) - len(found):
            logger.info("%s: %d folders without images are left out", self.path, left_out)
        return ClassFolders(self, found, known)

    def recorded(self) -> dict[str, Any]:
        """Return the settings as the index records them, with the earlier name of one."""
        settings = super().recorded()  # indexes have the earlier name
        return settings | {"names": settings["class_names"], "class_names": None}


def _has_images(folder: Place) -> bool:
    """Return whether an image is right in a folder; all count under a URL, which has no others."""
    if not isinstance(folder, Path):
        return True
    with os.scandir(folder) as there:
        return any(_is_image(each.name) and each.is_file() for each in there)


def _is_image(name: str) -> bool:
    return bool(split_image_suffix(name)[1]) and not is_left_behind(name)


class ClassFolders(SourceReader[ClassFolderSource]):
    """Lists the images of folders; the sorted names of these are the classes, from 0.

    Folders that come later are the classes after these.
    """

    files_are_folders = True
    has_captions = False

    @cached_property
    def _labels(self) -> dict[Place, int]:
        return {folder: label for label, folder in enumerate(self.files)}

    def _names(self, files: Sequence[Place], taken: Set[str]) -> dict[Place, str]:  # noqa: ARG002
        return {folder: folder.name for folder in files}

    def class_names(self) -> tuple[str, ...]:
        """Return one readable name per folder.

        Raises:
            SourceError: The file of names lacks a folder, or the folders are not those of the list.
        """
        names = {folder.name: folder.name.replace("_", " ") for folder in self.files}
        path = self.source.class_names
        if path is None:
            return tuple(names.values())
        if isinstance(path, str):
            return read_class_list(path).names_of_folders(list(names), str(self.source.path))
        try:
            document = json.loads(files.read(path))
            classes = document["classes"]
            given = dict(zip(document.get("folders", classes), classes, strict=True))
            return tuple(str(given[name]) for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"The class names {path} do not fit the folders of {self.source.path}: "
                f"{type(error).__name__} {error}. `folders` and `classes` of equal length (or "
                f"`classes` alone, the folders' names), with every folder, were expected. Correct "
                f"the file."
            ) from error

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield the images of one class folder, sorted by name."""
        keys, label = self.keys(file, counts), self._labels[file]
        for name, size in files.children(file):
            stem, suffix = split_image_suffix(name)
            if size is None or not _is_image(name):
                what = "files that are no images" if size is not None else "folders in a class"
                counts[f"{what} (ignored)"] += 1
                continue
            key, problem = keys.of(stem, suffix)
            yield Sample(key, str(file / name), offset=0, size=size, problem=problem, label=label)
