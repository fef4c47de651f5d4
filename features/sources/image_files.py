"""Image files that a table or an annotation file names: where they are, and none elsewhere."""

import os
import stat
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from features.errors import SourceError
from features.sources.sample import Counts, Sample
from features.status import Status
from features.storage.files import remote_size
from features.storage.place import Place, RemotePath

FOLDERS_KEPT = 1024


class ImageFolder:
    """Finds images by their names in a folder; what leads out of it, also by a link, is refused.

    Args:
        folder: What the names are relative to.
        table: What names the images, for messages.
    """

    def __init__(self, folder: Place, table: Place) -> None:
        self._folder = folder.resolve() if isinstance(folder, Path) else folder
        self._table = table
        self._beginning = f"{self._folder}/".replace("//", "/")
        # Images are mostly many to a folder, whose links are followed once.
        self._real = lru_cache(FOLDERS_KEPT)(os.path.realpath)

    def find(self, name: str) -> tuple[str, int | None]:
        """Return the path of an image, and its size or None where there is no such file.

        Raises:
            SourceError: The name leads out of the folder.
        """
        if isinstance(self._folder, RemotePath):
            return self._find_remote(self._folder, name)
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

    def _check(self, looked_at: str, image: str, name: str) -> None:
        if not f"{self._real(looked_at)}/".startswith(self._beginning):
            raise self._outside(name, f", but leads to {os.path.realpath(image)}")

    def _find_remote(self, folder: RemotePath, name: str) -> tuple[str, int | None]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise self._outside(name)
        place = folder / (quote(str(path)) if folder.has_escapes else str(path))
        return str(place), remote_size(place)

    def _outside(self, name: str, target: str = "") -> SourceError:
        return SourceError(
            f"{self._table} names the image {name!r}, which is not inside {self._folder}{target}. "
            f"Paths within that folder, also after links, were expected. Correct the table, or put "
            f"it into the folder that the links lead to."
        )


def place_image(sample: Sample, path: str, size: int | None, counts: Counts) -> None:
    """Say where the image of a sample is; one that is not there is quarantined, and counted."""
    sample.path = path
    if size is not None:
        sample.offset, sample.size = 0, size
    else:
        counts["image files that are not there (quarantined)"] += 1
        sample.problem = sample.problem or int(Status.MISSING_IMAGE)
