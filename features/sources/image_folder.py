"""Finds images by the names that tables and annotations give them."""

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from features.errors import SourceError
from features.sources.base import IMAGE_SUFFIXES, Counts, Sample, SourceReader
from features.status import Status
from features.storage.files import remote_size
from features.storage.place import Place, RemotePath

FOLDERS_KEPT = 1024
NAMES_SHOWN = 5
NAME_SHOWN = 300
OTHERWISE_SPELT = "images found under another spelling: case, form of Unicode, suffix (read)"


@dataclass(frozen=True)
class FoundImage:
    """Where an image is that a table names."""

    name: str
    """As the table has it, with `/` between folders."""
    path: str
    size: int | None
    """None where there is no such file."""
    is_otherwise_spelt: bool = False


class ImageFolder:
    r"""Finds images by their names in a folder; what leads out of it, also by a link, is refused.

    Names as other systems write them are found too, where one file alone fits: with `\` between
    folders, in other case, in the other form of Unicode, without the suffix, with blanks around.

    Args:
        folder: What the names are relative to.
        table: What names the images, for messages.
    """

    def __init__(self, folder: Place, table: Place) -> None:
        self._folder = folder.resolve() if isinstance(folder, Path) else folder
        self._table = table
        self._beginning = f"{self._folder}/".replace("//", "/")
        # Many images share a folder, so the links of a folder are followed once.
        self._real = lru_cache(FOLDERS_KEPT)(os.path.realpath)
        self._spellings = lru_cache(FOLDERS_KEPT)(_spellings)

    def find(self, name: str) -> FoundImage:
        """Return where an image is.

        Raises:
            SourceError: The name leads out of the folder.
        """
        if isinstance(self._folder, RemotePath):
            return self._find_remote(self._folder, name)
        name = name.removeprefix("file://")
        if "://" in name:
            raise self._outside(name)
        if name.startswith("/") and not os.path.lexists(name):  # the root of a web site
            rooted = name.lstrip("/")
            path, size = self._find(rooted)
            if size is not None:
                return FoundImage(rooted, path, size, is_otherwise_spelt=True)
        path, size = self._find(name)
        if size is None and "\\" in name:
            posix = name.replace("\\", "/")
            path, size = self._find(posix)
            name = posix
        if size is None and (spelt := self._otherwise_spelt(name)):
            path, size = self._find(spelt)
            return FoundImage(name, path, size, is_otherwise_spelt=True)
        return FoundImage(name, path, size)

    def describe(self, name: str) -> str:
        """Say what is where a missing image should be."""
        if isinstance(self._folder, RemotePath):
            return ""
        posix = PurePosixPath(name.replace("\\", "/"))
        for parent in posix.parents:
            folder = self._folder / parent
            try:
                names = sorted(os.listdir(folder))  # noqa: PTH208 - names alone
            except (OSError, ValueError):
                continue
            shown = ", ".join(map(repr, names[:NAMES_SHOWN])) or "nothing"
            return f"In {folder} there is {shown}{', …' * (len(names) > NAMES_SHOWN)}."
        return f"There is no folder {self._folder}."

    def _find(self, name: str) -> tuple[str, int | None]:
        path = str(self._folder / name)
        try:
            self._check(os.path.dirname(path), path, name)  # noqa: PTH120 - of many millions
            about = os.lstat(path)
            if not stat.S_ISREG(about.st_mode):  # a link, or what is no file
                self._check(path, path, name)
                about = Path(path).stat()
        except (OSError, ValueError):  # no file, too long a name, no folder to read, no UTF-8
            return path, None
        return path, about.st_size if stat.S_ISREG(about.st_mode) else None

    def _otherwise_spelt(self, name: str) -> str | None:
        """Return the name of the one file that fits, part by part."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or "\0" in name:
            return None
        place = Path(self._folder)  # type: ignore[arg-type]
        for part in parts:
            found = self._spellings(place).get(_folded(part), ())
            if part in found:
                found = (part,)
            if len(found) != 1:
                return None
            place /= found[0]
        return str(place.relative_to(self._folder))  # type: ignore[arg-type]

    def _check(self, looked_at: str, image: str, name: str) -> None:
        if not f"{self._real(looked_at)}/".startswith(self._beginning):
            raise self._outside(name, f", but leads to {os.path.realpath(image)}")

    def _find_remote(self, folder: RemotePath, name: str) -> FoundImage:
        beginning = f"{folder}/"
        if name.startswith(beginning):
            name = name.removeprefix(beginning)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "://" in name:
            raise self._outside(name)
        place = folder / (quote(str(path)) if folder.has_escapes else str(path))
        return FoundImage(name, str(place), remote_size(place))

    def _outside(self, name: str, target: str = "") -> SourceError:
        if "://" in name:
            return SourceError(
                f"{self._table} names the image {name!r}, a URL, and not a file in {self._folder}. "
                f"Fetch the images once, with `img2dataset --url_list {self._table} "
                f"--output_format webdataset`, and give its tars to a source of kind "
                f"'webdataset'; or set `images` of the source to the URL that all begin with."
            )
        return SourceError(
            f"{self._table} names the image {name!r:.{NAME_SHOWN}}, which is not inside "
            f"{self._folder}{target:.{NAME_SHOWN}}. Set `images` of the source to the "
            f"folder that holds all images, or correct the table."
        )


def place_image(
    sample: Sample,
    found: FoundImage,
    images: ImageFolder,
    reader: SourceReader[Any],
    counts: Counts,
) -> None:
    """Say where the image of a sample is; one that is not there is quarantined, and counted."""
    sample.path = found.path
    if found.size is not None:
        sample.offset, sample.size = 0, found.size
        if found.is_otherwise_spelt:
            counts[OTHERWISE_SPELT] += 1
    else:
        reader.hint = reader.hint or images.describe(found.name)
        counts["image files that are not there (quarantined)"] += 1
        sample.problem = sample.problem or int(Status.MISSING_IMAGE)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def _spellings(folder: Path) -> Mapping[str, Sequence[str]]:
    """Return the names in a folder by how they may be written: folded, and without suffix."""
    found: dict[str, list[str]] = defaultdict(list)
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names alone
    except OSError:
        return {}
    for name in names:
        found[_folded(name)].append(name)
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if stem and suffix.lower() in IMAGE_SUFFIXES and _folded(stem) not in names:
            found[_folded(stem)].append(name)
    return found
