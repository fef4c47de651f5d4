"""Places as settings: checked when a run file is read, and written as text."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, PlainValidator

from features.storage.place import Place, RemotePath, as_place


def as_place_setting(value: Any) -> Place:
    """Return a setting as a place.

    Raises:
        ValueError: It is no path and no URL.
    """
    if not isinstance(value, str | Path | RemotePath):
        raise ValueError(f"a path or a URL was expected, got {value!r}")
    return as_place(value)


def _pattern(pattern: str) -> str:
    as_place(pattern)  # refuses URLs that cannot be read, or carry credentials
    return pattern


PlaceSetting = Annotated[Place, PlainValidator(as_place_setting), PlainSerializer(str)]
"""A path or a URL."""
Pattern = Annotated[str, AfterValidator(_pattern)]
"""A pattern of files, local or under a URL."""
