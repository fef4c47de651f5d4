"""What a path setting names: a file or folder on local disk, or one under a URL."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, PlainValidator

from features.errors import PlaceError

SCHEMES = ("s3", "gs", "http", "https", "hf")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(https?://[^?\s'\"<>]*)\?[^\s'\"<>]*")


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder under a URL. It holds no credentials: those are in the environment."""

    scheme: str
    """One of `SCHEMES`."""
    path: str
    """`<bucket>/<key>`, `<host>/<path>`, or `datasets/<owner>/<name>/<path>` on the hub."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, part: str) -> "RemotePath":
        return RemotePath(self.scheme, f"{self.path}/{part.strip('/')}" if part else self.path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Last part of the path without its suffix."""
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        """What follows the last dot of the name, with the dot."""
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder that holds it."""
        return RemotePath(self.scheme, self.path.rpartition("/")[0] or self.path)

    @property
    def bucket(self) -> str:
        """First part of the path: a bucket, or a host with its port."""
        return self.path.partition("/")[0]

    @property
    def key(self) -> str:
        """What follows the bucket or host."""
        return self.path.partition("/")[2]

    @property
    def has_escapes(self) -> bool:
        """Whether `%20` in it stands for a blank, as in a web address."""
        return self.scheme in ("http", "https")

    @property
    def can_be_listed(self) -> bool:
        """Whether its server tells which files there are; web servers do not."""
        return not self.has_escapes

    @property
    def can_be_written(self) -> bool:
        """Whether files can be put there; web servers and the hub are only read."""
        return self.scheme in ("s3", "gs")


Place = Path | RemotePath


def as_place(text: str | Place) -> Place:
    """Return the place that a path or URL names.

    Raises:
        PlaceError: The URL is of a kind that cannot be read, or carries credentials.
    """
    if not isinstance(text, str):
        return text
    scheme, separator, path = text.partition("://")
    if not separator:
        return local_path(text)
    if scheme not in SCHEMES or "" in path.rstrip("/").split("/"):
        raise PlaceError(
            f"{without_secrets(text)} is no place that can be read. A local path, or a URL that "
            f"begins with {', '.join(f'{name}://' for name in SCHEMES)} and has no empty part, "
            f"was expected. Correct it."
        )
    if without_secrets(text) != text:
        raise PlaceError(
            f"The URL {without_secrets(text)} carries credentials or a query, which would be "
            f"written into the index and the store. A plain address was expected. Take them out, "
            f"and give credentials in the environment (AWS_*, GOOGLE_*, HF_TOKEN)."
        )
    return RemotePath(scheme, path.rstrip("/"))


def local_path(text: str) -> Path:
    """Return the path that a text is, with the home folder for a leading `~`."""
    # That of pathlib fails where there is no such user.
    return Path(os.path.expanduser(text))  # noqa: PTH111


def without_secrets(text: str) -> str:
    """Return a text in which URLs have neither user and password nor a query."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def posix(place: Place) -> PurePosixPath:
    """Return the whole path of a place: absolute if local, with the bucket or host if not."""
    return PurePosixPath(place.absolute() if isinstance(place, Path) else place.path)


def can_be_listed(place: Place) -> bool:
    """Return whether one can ask which files there are; web servers do not tell."""
    return isinstance(place, Path) or place.can_be_listed


def as_place_setting(value: Any) -> Place:
    """Return a setting as a place.

    Raises:
        ValueError: It is no path and no URL.
    """
    if not isinstance(value, str | Path | RemotePath) or not str(value).strip():
        raise ValueError(f"a path or a URL was expected, got {value!r}")
    return as_place(value)


def _folder(value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "://" in str(value):
        raise ValueError(f"a folder of this machine was expected, got {value!r}")
    return local_path(str(value))


def _pattern(pattern: str) -> str:
    as_place(pattern)  # refuses URLs that cannot be read, or carry credentials
    return pattern


PlaceSetting = Annotated[Place, PlainValidator(as_place_setting), PlainSerializer(str)]
"""A path or a URL."""
FolderSetting = Annotated[Path, PlainValidator(_folder), PlainSerializer(str)]
"""A folder of this machine."""
Pattern = Annotated[str, AfterValidator(_pattern)]
"""A pattern of files, local or under a URL."""
