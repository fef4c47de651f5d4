"""One folder of images per class (ImageFolder)."""

import json
from collections.abc import Iterator, Mapping

from features.class_lists import read_class_list
from features.config import ClassFolderSource
from features.errors import SourceError
from features.sources.reader import Counts, Keys, Sample, split_image_suffix
from features.storage import files
from features.storage.place import Place


class ClassFolders:
    """The sorted names of the folders are the classes 0, 1, …; a JSON file can name them better.

    Folders that come later are the classes after these.
    """

    def __init__(self, source: ClassFolderSource, known: Mapping[Place, str]) -> None:
        children = files.children(source.path)
        folders = [name for name, size in children if size is None and name[0] != "."]
        found: dict[Place, str] = {source.path / name: name for name in folders}
        self.files = {folder: name for folder, name in known.items() if folder in found} | found
        self._labels = {folder: label for label, folder in enumerate(self.files)}
        self._source = source
        if not self.files:
            raise SourceError(
                f"{source.path} has no folders. One folder of images per class was expected. "
                f"Correct `path` of the source."
            )

    def class_names(self) -> tuple[str, ...]:
        """Return one readable name per folder.

        Raises:
            SourceError: The file of names lacks a folder, or the folders are not those of the list.
        """
        names = {folder.name: folder.name.replace("_", " ") for folder in self.files}
        path = self._source.names
        if path is None:
            return tuple(names.values())
        if isinstance(path, str):
            return read_class_list(path).names_of_folders(list(names), str(self._source.path))
        try:
            document = json.loads(files.read(path))
            classes = document["classes"]
            given = dict(zip(document.get("folders", classes), classes, strict=True))
            return tuple(str(given[name]) for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"The class names {path} do not fit the folders of {self._source.path}: "
                f"{type(error).__name__} {error}. `folders` and `classes` of equal length (or "
                f"`classes` alone, the folders' names), with every folder, were expected. Correct "
                f"the file."
            ) from error

    def check(self) -> None:
        """Accept any settings: there are no captions to look for."""

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield the images of one class folder, sorted by name."""
        keys = Keys(self.files[file], counts)
        label = self._labels[file]
        for name, size in files.children(file):
            stem, suffix = split_image_suffix(name)
            if size is None or not suffix:
                counts["files that are no images (ignored)"] += 1
                continue
            key, problem = keys.of(stem, suffix)
            yield Sample(key, str(file / name), offset=0, size=size, problem=problem, label=label)
