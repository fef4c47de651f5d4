"""What every kind of source shares: settings, samples, and how files are listed and read.

A kind of source is one file beside this one, and a line in `features.sources.SOURCES`. It has
settings, which open a reader that lists samples, and a reader of images, if they are no files.
"""

import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveInt, model_validator

from features.class_lists import check_order, read_class_list
from features.config import SETTINGS, ClassNames
from features.errors import FileEndsEarlyError, SourceError
from features.sources.captions import CaptionPicker
from features.sources.text import decoded, lines_of, number_or_name
from features.status import Status
from features.storage import files
from features.storage.files import matching_places
from features.storage.place import Place, RemotePath, as_place, posix
from features.storage.requests import read_ranges

NETPBM_SUFFIXES = frozenset({"ppm", "pgm", "pbm", "pnm", "pfm"})
IMAGE_SUFFIXES = NETPBM_SUFFIXES | frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"}
    | {"avif", "avifs", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "heic", "heif", "hif"}
)
"""Every suffix of a format that is decoded, and HEIC, so that such an image keeps its row."""
LEFT_BEHIND = frozenset(
    {"__MACOSX", "lost+found", "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot"}
    | {"$RECYCLE.BIN", "RECYCLER", "System Volume Information"}
)
"""Folders of archives, disks and network drives."""
Counts = Counter[str]
NO_PLACE = -1
OTHER_SHARE = "samples of another `share` (left out)"
Known = Mapping[Place, str]
NONE: Known = MappingProxyType({})


@dataclass(slots=True)
class Sample:
    """One row of the index."""

    key: str
    path: str = ""
    """File that holds the image: a shard, or the image file itself."""
    offset: int = NO_PLACE
    """First byte of the image in the file, 0 where it is the whole file; in a parquet file, the
    number of its row."""
    size: int = NO_PLACE
    """Bytes of the image; -1 in a parquet file, or where there is no image."""
    problem: int = 0
    """A `Status` that quarantines the row whatever its bytes, or 0."""
    label: int = -1
    group: int = -1
    box: Sequence[int] | None = None
    """Left, top, right and bottom in pixels, where the sample is a part of the image."""
    captions: dict[str, str] = field(default_factory=dict)
    label_name: str = ""
    """The class by its name, where no number stands there; the index gives it a label."""
    group_name: str = ""


class ImageReader:
    """Reads encoded images by their places; any number of threads may share one.

    This one reads images that are files, or byte ranges of files.
    """

    def read(self, path: str, places: Sequence[tuple[int, int]]) -> Sequence[bytes | None]:
        """Return images of one file; None where there is none.

        Args:
            path: The file, as in `Sample.path`.
            places: `Sample.offset` and `Sample.size` of each image.

        Raises:
            SourceError: The file is missing, cannot be read, or changed since it was indexed.
        """
        place = as_place(path)
        if isinstance(place, RemotePath):
            return _remote_images(place, places)
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait
        except OSError as error:
            raise SourceError(
                f"{path} cannot be opened ({error.strerror}). Restore it, or index again."
            ) from error
        try:
            return [_image(file, path, *where) for where in places]
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read ({error.strerror}). Check the disk, and run the command "
                f"again."
            ) from error
        finally:
            os.close(file)


def _image(file: int, path: str, offset: int, size: int) -> bytes:
    image = os.pread(file, size, offset)
    if len(image) != size:
        raise _changed(path, f"ends at byte {offset + len(image)}, within an image, and did not")
    if offset == 0 and os.fstat(file).st_size != size:  # within a tar, offsets are from 512
        raise _changed(path, f"has {os.fstat(file).st_size} bytes and had {size}")
    return image


def _remote_images(place: RemotePath, places: Sequence[tuple[int, int]]) -> Sequence[bytes]:
    """Read images under a URL: a file of its own whole, those in a tar by their ranges."""
    first, size = places[0]
    if first == 0:
        image = files.read(place)
        if len(image) != size:
            raise _changed(str(place), f"has {len(image)} bytes and had {size}")
        return [image] * len(places)
    try:
        found = read_ranges(place, [(offset, offset + size) for offset, size in places])
        return list(map(bytes, found))
    except FileEndsEarlyError as error:
        raise _changed(str(place), f"has {error.size} bytes, and had more") from error


def _changed(path: str, what: str) -> SourceError:
    return SourceError(
        f"{path} {what} when it was indexed. Restore it, or delete the index and the store to "
        f"start again."
    )


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


OF_LATER: Any = {"of_later": True}
"""Marks a setting that the first indexes do not have; they stay valid while it is not given."""


def _not_empty(share: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= share[0] < share[1] <= 1:
        raise ValueError(f"two rising numbers from 0 to 1 were expected, got {list(share)}")
    return share


Share = Annotated[tuple[float, float], AfterValidator(_not_empty)]


class SourceSettings(BaseModel):
    """Settings that all kinds of sources have; each kind adds `kind` and its own."""

    model_config = SETTINGS

    captions: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Name or names that hold captions (JSON keys, columns; `txt` for `.txt` members). One that
    holds a list gives the fields `0`, `1`, … Empty: those of `caption`, `captions`, `short`,
    `long`, `txt` that are there."""

    label: str | None = "label"
    """Name that holds the class as an integer, where there is one."""

    group: str | None = "group"
    """Name that holds the number of a compositional example, where there is one."""

    class_names: ClassNames | None = None
    """Names of the classes in the order of the labels: a list that ships with the program, such as
    `imagenet-1k` (docs/datasets.md has all), or a text file with one name a line. Refused where the
    data carry names of their own in another order."""

    rows: PositiveInt | None = None
    """Take only the first rows in index order; all if not given."""

    share: Share | None = Field(default=None, json_schema_extra=OF_LATER)
    """Take only the samples whose key (of compositional examples: whose group) falls between these
    two numbers by its hash. `[0, 0.9]` in one split and `[0.9, 1]` in another of the same `path`
    have no sample in common, also when rows are added."""

    has_samples: ClassVar[bool] = True
    """Whether there is something to read; not where the features of a split were imported."""

    unused: ClassVar[Set[str]] = frozenset()
    """Settings that a kind inherits and has no use for; they are refused."""

    @model_validator(mode="after")
    def _every_setting_is_of_use(self) -> "SourceSettings":
        for name in sorted(self.unused & self.model_fields_set):
            if getattr(self, name) != type(self).model_fields[name].default:
                kind = getattr(self, "kind", "")
                raise ValueError(
                    f"`{name}` has no effect on a source of kind {kind!r}; take it out"
                )
        return self

    def open(
        self,
        known: Known = NONE,
        *,
        folder: Path | None = None,  # noqa: ARG002 - of those that make files
    ) -> "SourceReader[Any]":
        """Find the files of the source.

        Args:
            known: Files that were indexed before, with their names: they keep both, and come
                first.
            folder: Where a source that makes its own files puts them.

        Raises:
            SourceError: Nothing matches its path.
        """
        return self._open(known)

    def _open(self, known: Known) -> "SourceReader[Any]":  # what most kinds have in place of `open`
        raise NotImplementedError

    def image_reader(self) -> ImageReader:
        """Return what reads the images of its samples."""
        return ImageReader()

    def recorded(self) -> dict[str, Any]:
        """Return the settings as the index records them."""
        later = {
            name
            for name, about in type(self).model_fields.items()
            if about.json_schema_extra == OF_LATER and getattr(self, name) is None
        }
        return self.model_dump(mode="json", exclude=later)

    # What `sail plan` and `sail doctor` say of a source before it is indexed.

    @property
    def known_rows(self) -> int | None:
        """How many rows the source has, where its settings alone say so."""
        return None

    @property
    def expected_fields(self) -> tuple[str, ...]:
        """Caption fields that the settings name; empty where the data decide."""
        return self.captions

    def summary(self) -> str:
        """Say in words what is there.

        Raises:
            SourceError: Nothing is.
        """
        return f"{len(self.open().files)} files"


Settings = TypeVar("Settings", bound=SourceSettings)


class SourceReader(ABC, Generic[Settings]):
    """Lists the samples of a source, file by file.

    Args:
        source: Settings, as they are recorded in the index.
        found: Its files or folders.
        known: Those that were indexed before, with their names.
    """

    files_are_folders: ClassVar[bool] = False
    """Whether `files` are folders, whose time and size say nothing of what is in them."""
    has_captions: ClassVar[bool] = True
    """Whether `captions` of the settings says where the captions are."""
    may_be_rewritten: ClassVar[bool] = False
    """Whether a file may change after it was indexed. Its rows are then listed and compared."""

    files: Mapping[Place, str]
    """Files or folders in the order in which they are read, and what their keys begin with."""

    def __init__(self, source: Settings, found: Iterable[Place], known: Known) -> None:
        self.source = source
        self.place = str(getattr(source, "path", ""))
        """Where the source is, for messages."""
        every = dict.fromkeys(found)
        kept = {file: name for file, name in known.items() if file in every}
        added = [file for file in every if file not in known]
        self.files = kept | self._names(added, set(known.values()))
        self.picker = CaptionPicker(source.captions, self.place)
        self.hint = ""
        """What is there instead of the first image that is missing, for messages."""

    @abstractmethod
    def samples(self, file: Place, counts: Counts) -> Iterator[Sample]:
        """Yield the samples of one file in their order, and count what was handled by rule.

        Raises:
            SourceError: The file cannot be read.
        """

    def is_taken(self, sample: Sample) -> bool:
        """Return whether a sample is in the `share` of the settings."""
        if self.source.share is None:
            return True
        group = sample.group_name or (str(sample.group) if sample.group >= 0 else "")
        # With a word before it, so that it says nothing of the hash that holds rows out later.
        word = f"share {group or sample.key}".encode("utf-8", "surrogateescape")
        number = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")
        low, high = self.source.share
        return low <= number / 2**64 < high

    def _names(self, files: Sequence[Place], taken: Set[str]) -> dict[Place, str]:
        return distinct_stems(files, taken)

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the labels: those of the settings, or the data's own, if any.

        Raises:
            SourceError: Both name them, in another order.
        """
        given, own = read_class_names(self.source.class_names), self.own_class_names()
        if own is None:
            return given
        names, place = own
        if given is not None:
            by = f"class_names = {self.source.class_names}"
            check_order(given, names, given_by=by, own_by=str(place))
        return given or names

    def own_class_names(self) -> tuple[tuple[str, ...], Place] | None:
        """Return the names of the labels in the data, and the file that has them, if one has."""
        return None

    def num_samples(self, file: Place) -> int | None:  # noqa: ARG002 - of those that know
        """Return how many samples a file has, where that is known without listing them."""
        return None

    @property
    def files_beside(self) -> tuple[Place, ...]:
        """Further files that the samples are made of, such as a table of captions."""
        return ()

    @property
    def known_fields(self) -> Collection[str]:
        """Caption fields that are known before a sample is listed."""
        return ()

    def leftover(self) -> Counts:
        """Count what was no sample's; called when all have been listed."""
        return Counts()

    def check(self) -> None:
        """Refuse a name of captions that no sample had; called when all have been listed.

        Raises:
            SourceError: Naming it, and the nearest that is there.
        """
        if self.has_captions:
            self.picker.check()

    def keys(self, file: Place, counts: Counts) -> "Keys":
        """Return what gives the samples of a file their keys."""
        return Keys(self.files[file], counts)

    def describe(self, sample: Sample, record: Mapping[str, Any], counts: Counts) -> None:
        """Take captions, label and group of a sample out of a record, where it has them."""
        sample.captions |= self.picker.pick(record, counts)
        label, group = self.source.label, self.source.group
        if label and label in record:
            found = number_or_name(record[label], counts)
            sample.label, sample.label_name = (-1, found) if isinstance(found, str) else (found, "")
        if group and group in record:
            found = number_or_name(record[group], counts, of_any_size=True)
            sample.group, sample.group_name = (-1, found) if isinstance(found, str) else (found, "")


class Keys:
    """Gives the samples of one shard unique keys, `<shard>/<name>`."""

    def __init__(self, shard: str, counts: Counts) -> None:
        self._shard = shard
        self._counts = counts
        self._suffixes: dict[str, str] = {}
        self._repeats: Counter[str] = Counter()

    def of(self, name: str, suffix: str = "") -> tuple[str, int]:
        """Return the key of a name, and a problem if the name came before.

        A name that comes again is numbered (`#2`) and quarantined.

        Args:
            name: Name within the shard.
            suffix: What was taken off the name to make it short. Where two names differ in it
                only, the later keeps it: it is no duplicate.
        """
        earlier = self._suffixes.get(name)
        if earlier is not None and earlier != suffix:
            name, suffix = name + suffix, ""
            earlier = self._suffixes.get(name)
        if earlier is None:
            self._suffixes[name] = sys.intern(suffix)  # the same few, of many millions of names
            return f"{self._shard}/{name}", 0
        self._counts["duplicate keys (quarantined)"] += 1
        return f"{self._shard}/{self._numbered(name)}", int(Status.DUPLICATE_KEY)

    def names(self) -> set[str]:
        """Return all names so far."""
        return set(self._suffixes)

    def _numbered(self, name: str) -> str:
        while True:
            self._repeats[name] += 1
            numbered = f"{name}#{self._repeats[name] + 1}"
            if numbered not in self._suffixes:
                self._suffixes[numbered] = ""
                return numbered


def split_image_suffix(name: str) -> tuple[str, str]:
    """Split a path before its last suffix, if that is one of an image."""
    suffix = PurePosixPath(name).suffix
    if suffix[1:].lower() not in IMAGE_SUFFIXES:
        return name, ""
    return name.removesuffix(suffix), suffix


def is_left_behind(name: str) -> bool:
    """Return whether systems leave a file or folder of this name among those of people."""
    return name.startswith(".") or name in LEFT_BEHIND


def matching_files(patterns: str | Sequence[str]) -> list[Place]:
    """Return the files of glob patterns, sorted within each, each once.

    Raises:
        SourceError: A pattern matches no file.
    """
    found: dict[Place, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found |= dict.fromkeys(matching_places(pattern))
        except FileNotFoundError as error:
            raise SourceError(
                f"No file matches {error}. Correct `path` of the source; it is relative to the run "
                f"file, and names files (`folder/*`), no folder."
            ) from error
    return list(found)


def read_class_names(path: str | Place | None) -> tuple[str, ...] | None:
    """Return the names of a list that ships with the program, or the lines of a file.

    Raises:
        SourceError: The file is not there, or a line between others is empty.
    """
    if path is None:
        return None
    if isinstance(path, str):
        return read_class_list(path).classes
    expected = "A text file with one name a line was expected. Correct `class_names` of the source."
    try:
        text = decoded(files.read(path))
    except OSError as error:
        raise SourceError(f"The class names {path} cannot be read ({error}). {expected}") from error
    if text is None:
        raise SourceError(f"The class names {path} are not in UTF-8. {expected}")
    names = [line.strip() for line in lines_of(text.rstrip())]
    if "" in names:
        raise SourceError(
            f"Line {names.index('') + 1} of the class names {path} is empty. A name on each line "
            f"was expected, since line 1 names label 0, line 2 label 1, and on. Write the name of "
            f"that class there, or take the line out if the labels do not count it."
        )
    return tuple(names)


def distinct_stems(files: Sequence[Place], taken: Set[str]) -> dict[Place, str]:
    """Name files by their stems, with as many folders as make all names distinct."""
    for depth in range(1, max((len(posix(file).parts) for file in files), default=0)):
        names = {file: _tail(file, depth) for file in files}
        if len(set(names.values())) == len(files) and not _clash(names.values(), taken):
            return names
    return {file: str(posix(file)) for file in files}  # they differ in the suffix only


def _clash(names: Iterable[str], taken: Set[str]) -> bool:
    """Return whether a name is taken, or one is the folder of another: keys could be the same."""
    folders = {str(folder) for name in taken for folder in PurePosixPath(name).parents}
    return any(
        name in taken
        or name in folders
        or any(str(folder) in taken for folder in PurePosixPath(name).parents)
        for name in names
    )


def _tail(file: Place, depth: int) -> str:
    return str(PurePosixPath(*posix(file).with_suffix("").parts[-depth:]))
