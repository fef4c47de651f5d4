"""Pictures as people have them: a table of captions that names them, or a folder alone."""

import itertools
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence, Set
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from features.config import DataPlace
from features.errors import SourceError
from features.sources.base import (
    OF_LATER,
    Counts,
    Known,
    Sample,
    SourceReader,
    is_left_behind,
    split_image_suffix,
)
from features.sources.image_folder import FoundImage, ImageFolder, place_image
from features.sources.joined import JoinableSettings, JoiningReader
from features.sources.tables import READERS, table_rows, table_suffix
from features.sources.text import decoded, number_or_name
from features.storage.files import is_file
from features.storage.parallel import in_order
from features.storage.place import Place

Row = dict[str, Any]
IMAGE_COLUMNS = frozenset(
    {"file_name", "filename", "filepath", "file_path", "image_path", "image_name", "image_file"}
    | {"img", "img_path"}
)
SIDECARS = (".txt", ".caption")
OF_CAMERAS = frozenset(
    {"img", "image", "imag", "dsc", "dscn", "dscf", "dcim", "pxl", "mvimg", "pict", "picture"}
    | {"photo", "foto", "screenshot", "whatsapp", "copy", "kopie", "edited", "burst", "camera"}
)
"""What programs write into names of pictures, in lower case."""
REPEATED_ROWS = "further rows of an image with a caption that it has (not used)"
OTHER_LABELS = "images whose rows have several labels (that of the first is used)"
EMPTY_ROWS = "empty rows of a table (ignored)"


class FolderSource(JoinableSettings):
    """Pictures: a table that names them beside their captions, or their folder alone."""

    kind: Literal["folder"]
    path: DataPlace
    """The table (`.csv`, `.tsv`, `.txt`, `.jsonl`, `.json`, `.parquet`). The first line of text
    names the columns; they are separated by what comes first there of comma, semicolon, tab and bar
    (those between quotation marks do not count). Names of columns are found in any case. Or a
    folder of pictures without a table: all of those below it, with the `.txt` or
    `.caption` of the same name as caption, where there is one. There `captions = "name"` takes the
    words in the names of folders and file (without numbers, and what cameras write), and
    `label = "folder"` the folder of a picture as its class."""
    image: str = "image"
    """Column that names the image file. Where it is not given and there is no `image`, that of
    `file_name`, `filename`, `filepath`, `file_path` and `image_path` which is there."""
    images: DataPlace | None = Field(default=None, json_schema_extra=OF_LATER)
    """Folder of the images, or its URL: what the table names is relative to it, or an absolute path
    inside of it. The folder of the table if not given."""

    def _open(self, known: Known) -> "SourceReader[FolderSource]":
        if isinstance(self.path, Path) and self.path.is_dir():
            beside = [place for place in self.path.iterdir() if table_suffix(place) in READERS]
            if self.table:
                beside = [place for place in beside if place not in self.tables()]
            tables = sorted(place.name for place in beside)
            named = [name for name in tables if not name.lower().endswith((".txt", ".json"))]
            if named:
                raise SourceError(
                    f"The folder {self.path} holds the table {named[0]}. A table, or a folder of "
                    f"pictures without one, was expected. Set `path` of the source to "
                    f"{self.path / named[0]}, or put the table elsewhere."
                )
            return PictureFolder(self, [self.path], known)
        if not is_file(self.path):
            raise SourceError(
                f"There is no table {self.path}. A file ({', '.join(READERS)}) with a column "
                f"{self.image!r} that names images was expected, or a folder of pictures. Correct "
                f"`path` of the source."
            )
        return CaptionTable(self, [self.path], known)


class CaptionTable(JoiningReader[FolderSource]):
    """Lists the images that a table names.

    Rules: all rows of one image (and of one group) are one sample, wherever they stand, their
    captions the fields 0, 1, and on (if any image has several). Rows that repeat a caption, where
    no image has several, are dropped. Label and group are those of the first row. Rows without any
    text are left out. A file that is not there keeps a quarantined row. A path that leads out of
    the folder of images is refused, also by a link.
    """

    may_be_rewritten = True

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield one sample per image of the table.

        Raises:
            SourceError: The table cannot be read, or a row names no image, or one elsewhere.
        """
        keys = self.keys(file, counts)
        several, scattered = self._has_rows_of_one_image(file)
        images = ImageFolder(self.source.images or file.parent, file)
        named = self._gathered(file, counts) if scattered else self._grouped(file, counts)

        def find(image: tuple[str, Sequence[Row]]) -> tuple[FoundImage, Sequence[Row]]:
            return images.find(image[0]), image[1]

        for found, rows in in_order(find, named, at=self.source.images or file):
            key, problem = keys.of(*split_image_suffix(found.name))
            sample = Sample(key, problem=problem)
            self.describe(sample, rows[0], counts)
            if several:
                captions = [sample.captions, *(self.picker.pick(row, counts) for row in rows[1:])]
                texts = itertools.chain.from_iterable(each.values() for each in captions)
                sample.captions = {str(i): text for i, text in enumerate(texts)}
            elif len(rows) > 1:
                counts[REPEATED_ROWS] += len(rows) - 1
            if len({str(self._value(row, self.source.label)) for row in rows}) > 1:
                counts[OTHER_LABELS] += 1
            place_image(sample, found, images, self, counts)
            columns = (*(self.joined.columns if self.joined else ()), "url", "key")
            names = found.name, Path(found.name).name
            self.join(sample, (*map(rows[0].get, columns), *names), counts)
            yield sample

    def _grouped(self, file: Place, counts: Counts) -> Iterator[tuple[str, Sequence[Row]]]:
        """Yield images whose rows follow each other; nothing is kept."""
        for (name, _), rows in itertools.groupby(self._rows(file, counts), itemgetter(0)):
            yield name, [row for _, row in rows]

    def _gathered(self, file: Place, counts: Counts) -> Iterator[tuple[str, Sequence[Row]]]:
        """Yield images whose rows stand apart, in the order of the first; all are in memory."""
        gathered: dict[tuple[str, object], list[Row]] = {}
        for image, row in self._rows(file, counts):
            gathered.setdefault(image, []).append(row)
        for (name, _), rows in gathered.items():
            yield name, rows

    def _has_rows_of_one_image(self, file: Place) -> tuple[bool, bool]:
        """Return whether an image has several captions, and whether its rows stand apart.

        By 64-bit hashes, so that a table of many millions of rows takes little memory.
        """
        runs, pairs, last = array("q"), array("q"), None
        for image, row in self._rows(file, Counts()):
            if image != last:
                runs.append(hash(image))
                last = image
            captions = [str(row[name]) for name in self.picker.names if name in row]
            pairs.append(hash((image, *captions)))
        images = _distinct(runs)
        return _distinct(pairs) > images, len(runs) > images

    def _rows(self, file: Place, counts: Counts) -> Iterator[tuple[tuple[str, object], Row]]:
        """Yield name and group of the image, and the row with columns named as in the settings."""
        columns: dict[str, str] | None = None
        for number, row in enumerate(table_rows(file, self.source.encoding), 1):
            if columns is None:
                columns = self._columns(row)
            for wanted, there in columns.items():
                row[wanted] = row.get(there)
            name = row.get(self.source.image)
            if not any(str(value or "").strip() for value in row.values()):
                counts[EMPTY_ROWS] += 1
                continue
            if not isinstance(name, str) or not name or "\0" in name:
                if any(split_image_suffix(str(each))[1] for each in row):
                    raise _no_header(file, list(row))
                raise SourceError(
                    f"Row {number} of {file} has {self.source.image} = {name!r}; its columns are "
                    f"{list(row)[:20]}. Set `image` of the source to the column that names the "
                    f"images, or correct the row."
                )
            group = number_or_name(self._value(row, self.source.group), Counts(), of_any_size=True)
            yield (name, group), row

    def _columns(self, row: Row) -> dict[str, str]:
        """Return what columns are called otherwise than in the settings: in other case."""
        source = self.source
        wanted = [source.image, source.label, source.group, *self.picker.names]
        renamed = {}
        for name in filter(None, wanted):
            if name not in row:
                alike = [each for each in row if _folded(each) == _folded(name)]
                if len(alike) == 1:
                    renamed[name] = alike[0]
        if "image" not in {*row, *renamed} and source.image == "image":
            others = [each for each in row if _folded(each) in IMAGE_COLUMNS]
            if len(others) == 1:
                renamed["image"] = others[0]
        return renamed

    def _value(self, row: Row, column: str | None) -> Any:
        return row.get(column) if column else None


class PictureFolder(JoiningReader[FolderSource]):
    """Lists all pictures below a folder, with the text file beside each as its caption.

    Rules: folders and files that systems leave behind (`__MACOSX`, `._a.jpg`, hidden ones) are left
    out; links are not followed.
    """

    files_are_folders = True

    def _names(self, files: Sequence[Place], taken: Set[str]) -> dict[Place, str]:  # noqa: ARG002
        return {folder: folder.name or "pictures" for folder in files}

    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield one sample per picture, sorted by folder and name."""
        keys = self.keys(file, counts)
        for folder, names in _folders_below(Path(str(file)), counts):
            texts = {name.lower(): name for name in names if name.lower().endswith(SIDECARS)}
            for name in names:
                stem, suffix = split_image_suffix(name)
                path = folder / name
                if not suffix or is_left_behind(name) or path.is_symlink():
                    counts["files that are no pictures (ignored)"] += name not in texts.values()
                    continue
                beside = [texts[low] for each in SIDECARS if (low := stem.lower() + each) in texts]
                within = (folder / stem).relative_to(str(file))
                key, problem = keys.of(str(within), suffix)
                sample = Sample(key, str(path), 0, path.stat().st_size, problem)
                about = {
                    "name": words_of_name(within) or None,
                    "folder": folder.name.replace("_", " "),
                }
                if beside:
                    text = decoded((folder / beside[0]).read_bytes(), self.source.encoding)
                    counts["texts that cannot be decoded (left out)"] += text is None
                    about["txt"] = text and text.strip()
                self.describe(sample, about, counts)
                self.join(sample, (f"{within}{suffix}", str(path), name), counts)
                yield sample


def _no_header(file: Place, first: list[str]) -> SourceError:
    return SourceError(
        f"The first line of {file} names no columns, but a picture: {first[:5]}. A line such as "
        f"image,caption was expected above it. Put one there."
    )


def words_of_name(path: Path) -> str:
    """Return the words in the names of a picture and its folders: `Summer 2019/a_cake` has three.

    Numbers, words with digits in them, and what cameras write are left out.
    """
    words = re.split(r"[\s!-/:-@\[-`{-~]+", " ".join(path.parts))  # marks are parts of words
    kept = [
        each
        for each in words
        if any(map(str.isalpha, each))
        and not any(map(str.isdigit, each))
        and each.casefold() not in OF_CAMERAS
    ]
    return " ".join(dict.fromkeys(kept))


def _folders_below(folder: Path, counts: Counts) -> Iterator[tuple[Path, Sequence[str]]]:
    for place, folders, names in os.walk(folder):
        counts["folders that systems leave behind (ignored)"] += sum(map(is_left_behind, folders))
        folders[:] = sorted(each for each in folders if not is_left_behind(each))
        yield Path(place), sorted(names)


def _distinct(hashes: Iterable[int]) -> int:
    return len(np.unique(np.frombuffer(hashes, dtype=np.int64))) if hashes else 0  # type: ignore[call-overload]


def _folded(name: str) -> str:
    return name.strip().casefold()
