"""File patterns: `*`, `?`, `[…]`, `**` as in a shell, and `{00000..00010}` as in webdataset."""

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from features.storage.files import children, files_below, is_file
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath, as_place

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")


def matching_places(pattern: str) -> list[Place]:
    """Return the files that match a pattern, sorted by name.

    What braces stand for is listed in the order in which they say it, and each must match.

    Raises:
        StorageError: A place under a URL cannot be listed.
    """
    plain = list(expanded(pattern))
    fixed = [as_place(item) for item in plain if not _is_glob(item)]
    remote = any(isinstance(place, RemotePath) for place in fixed)
    there = dict(zip(fixed, in_order(is_file, fixed, remote=remote), strict=True))
    found: list[Place] = []
    for item in plain:
        place = as_place(item)
        if place in there:
            matches: list[Place] = [place] if there[place] else []
        elif isinstance(place, RemotePath):
            matches = _remote_matches(place)
        else:
            matches = _local_matches(place)
        if not matches:
            raise FileNotFoundError(item)
        found += matches
    return found


def expanded(pattern: str) -> Iterator[str]:
    """Yield what the braces of a pattern stand for: `{a,b}`, or `{08..11}` with its zeros."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    values: Iterator[str] | Sequence[str] = (
        (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        if words is None
        else words.split(",")
    )
    for value in values:
        yield from expanded(pattern[: match.start()] + value + pattern[match.end() :])


def _is_glob(pattern: str) -> bool:
    signs = "*[" if pattern.startswith(("http://", "https://")) else "*?["
    return any(sign in pattern for sign in signs)


def _local_matches(pattern: Path) -> list[Place]:
    """Return the files that fit; what is there as it is written is no pattern, as `2019 [1]`."""
    if pattern.is_file():
        return [pattern]
    folder = next(parent for parent in pattern.parents if parent.is_dir())
    rest = str(pattern.relative_to(folder))
    names = glob.glob(rest, root_dir=folder, recursive=True)  # noqa: PTH207 - leaves out `.hidden`
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _remote_matches(pattern: RemotePath) -> list[Place]:
    parts = pattern.path.split("/")
    fixed = list(itertools.takewhile(lambda part: not _is_glob(part), parts))
    folder = RemotePath(pattern.scheme, "/".join(fixed))
    rest = parts[len(fixed) :]
    if len(rest) == 1 and rest != ["**"]:
        names = [[name] for name, size in children(folder) if size is not None]
    else:
        names = [str(place).split("/")[2 + len(fixed) :] for place, _ in files_below(folder)]
    return sorted(folder / "/".join(parts) for parts in names if _fits(parts, rest))


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path fits a pattern; `*` leaves out names that begin with `.`."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[start:], pattern[1:]) for start in range(len(names) + 1))
    if not names or (names[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])
