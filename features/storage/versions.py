"""Tells whether a file is the one it was, by its content where its time says nothing."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Literal

from features.storage.files import version, version_or_none
from features.storage.place import Place

BLOCK_BYTES = 1 << 16
BLOCKS = 64
MD5 = re.compile(r'"?[0-9a-f]{32}"?')
State = Literal["same", "copied", "changed", "gone"]


def described(place: Place) -> dict[str, Any]:
    """Return what is remembered of a file: size and time, and of a local one a hash of its content.

    Raises:
        FileNotFoundError: There is none.
    """
    found: dict[str, Any] = dict(version(place))
    return found | {"sha256_of_blocks": _hash(place)} if isinstance(place, Path) else found


def state_of(place: Place, remembered: dict[str, Any]) -> State:
    """Return what became of a file.

    `copied` is one of the same size with another time or ETag, of which no hash is remembered: it
    may be the same. S3's ETag of a file that was uploaded in one part is the MD5 of its content:
    where two such differ, so do the files.
    """
    now = version_or_none(place)
    if now is None or remembered.items() >= now.items():
        return "gone" if now is None else "same"
    ((kind, found),) = now.items()
    if remembered.get(kind, found)[0] != found[0]:
        return "changed"
    if isinstance(place, Path) and (digest := remembered.get("sha256_of_blocks")):
        return "same" if digest == _hash(place) else "changed"
    is_md5 = [MD5.fullmatch(str(version)) for version in (remembered.get(kind, found)[1], found[1])]
    return "changed" if all(is_md5) else "copied"


def state_elsewhere(place: Place, remembered: dict[str, Any]) -> State:
    """Return whether another file may be a copy: of the same size, and hash where one is known."""
    return state_of(place, {name: _without_time(value) for name, value in remembered.items()})


def _without_time(value: Any) -> Any:
    return [value[0], None] if isinstance(value, list) else value


def _hash(path: Path) -> str:
    """Hash a file of up to 4 MiB, or as many bytes of a larger one in blocks from all over it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = max(0, size - BLOCK_BYTES)
        for number in range(BLOCKS):
            is_whole = size <= BLOCKS * BLOCK_BYTES
            file.seek(number * BLOCK_BYTES if is_whole else last * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
