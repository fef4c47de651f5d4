"""Places as settings: checked when a run file is read, and written as text."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, PlainValidator

from features.storage.place import Place, RemotePath, as_place, local_path


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
