"""Class names and prompt templates of known data sets: one JSON file each, with its source.

Each file names the repository, file, commit, sha256 and licence that its lists were taken from,
word for word. `folders` are the names that the data set's own folders have, in the order of the
classes; a list that is `part_of` another takes the classes of its `indices` from there.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from features.errors import SourceError

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
CLASS_LISTS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
NAMES_SHOWN = 3


@dataclass(frozen=True)
class ClassList:
    """The classes of a data set, in the order of its labels."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    folders: tuple[str, ...] | None
    """Names of the data set's folders, where they differ from those of the classes."""

    def names_of_folders(self, folders: Sequence[str], place: str) -> tuple[str, ...]:
        """Return the class name of each folder, found by the folder's name and not by its place.

        A warning says so where classes have no folder.

        Raises:
            SourceError: A folder is not of the data set.
        """
        known = map(_letters, self.folders or self.classes)
        names = dict(zip(known, self.classes, strict=True))
        found = [_letters(folder) for folder in folders]
        unknown = [name for name, key in zip(folders, found, strict=True) if key not in names]
        missing = [names[key] for key in names if key not in found]
        if unknown:
            raise SourceError(
                f"The folders of {place} are not those of {self.name!r}: {len(unknown)} are none "
                f"of its {len(self.classes)} classes {unknown[:NAMES_SHOWN]}. Folders of its "
                f"classes were expected. Correct the folders, or give a JSON file of your own as "
                f"`class_names` of the source."
            )
        if missing:
            logger.warning(
                "%s has folders of %d of the %d classes of %s; none for %s",
                place,
                len(found),
                len(self.classes),
                self.name,
                missing[:NAMES_SHOWN],
            )
        return tuple(names[key] for key in found)


@cache
def read_class_list(name: str) -> ClassList:
    """Read one of `CLASS_LISTS`."""
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    folders = tuple(document["folders"]) if "folders" in document else None
    if "part_of" not in document:
        classes, templates = tuple(document["classes"]), tuple(document["templates"])
        return ClassList(name, classes, templates, folders)
    whole = read_class_list(document["part_of"])
    classes = tuple(whole.classes[index] for index in document["indices"])
    return ClassList(name, classes, whole.templates, folders)


def check_order(given: Sequence[str], own: Sequence[str], *, given_by: str, own_by: str) -> None:
    """Refuse class names that are in another order than those that the data themselves carry.

    Names may be worded differently, so only those that both have are compared, by their letters and
    digits up to the first comma. There must be as many of both.

    Args:
        given: Names from the recipe, in the order of the labels.
        own: Names in the data's own files, in that order.
        given_by: Where the first came from.
        own_by: Where the second came from.

    Raises:
        SourceError: The numbers differ, or a name stands for another label.
    """
    if len(given) != len(own):
        raise SourceError(
            f"{given_by} names {len(given)} classes, but {own_by} has {len(own)}. One name for "
            f"each was expected. Correct the names in the recipe."
        )
    places = [_places(names) for names in (given, own)]
    for name in places[0].keys() & places[1].keys():
        if not places[0][name] & places[1][name]:
            label, other = min(places[0][name]), min(places[1][name])
            raise SourceError(
                f"{given_by} names the classes in another order than {own_by}: {given[label]!r} "
                f"is class {label} there, and {other} here, where {label} is {own[label]!r}. The "
                f"order of the labels was expected. Correct the names in the recipe."
            )


def _places(names: Sequence[str]) -> dict[str, set[int]]:
    """Return the labels of each name; a name may stand twice (ImageNet has two cranes)."""
    places: dict[str, set[int]] = {}
    for label, name in enumerate(names):
        places.setdefault(_letters(name.split(",")[0]), set()).add(label)
    return places


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
