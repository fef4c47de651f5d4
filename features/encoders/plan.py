"""What an encoder will do, decided before it is loaded: each value, and the file that says it."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

RECIPE = "the recipe"


class Decision(NamedTuple):
    """A value, and what says it: a file, the recipe, or the type of the model."""

    value: Any
    source: str


@dataclass(frozen=True)
class EncoderPlan:
    """How an encoder will be used."""

    kind: Literal["image", "text"]
    model: str
    decisions: Mapping[str, Decision]
    """By the name of the value, in the order in which they are shown."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The files beside the weights that decide the vectors, by their name in the model's folder."""
    contradictions: tuple[str, ...] = ()
    """Where the recipe says otherwise than the model's own files; the recipe is followed."""
    notes: tuple[str, ...] = ()
    """What was changed so that the model can do it."""

    def __getitem__(self, name: str) -> Any:
        """Return a value."""
        return self.decisions[name].value

    def digests(self) -> dict[str, str]:
        """Return the sha256 of each file."""
        return {name: file_sha256(path) for name, path in sorted(self.files.items())}

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON holds it."""
        return {
            "kind": self.kind,
            "model": self.model,
            "plan": {
                name: {"value": each.value, "from": each.source}
                for name, each in self.decisions.items()
            },
            "files": self.digests(),
            "warnings": list(self.contradictions),
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """Return one line: every value with its source."""
        return "; ".join(
            f"{name} {shown(each.value)} ({each.source})" for name, each in self.decisions.items()
        )


def shown(value: Any) -> str:
    """Return a value of a plan in words."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)


class PlanBuilder:
    """Collects decisions: the recipe first, then what the model's files say."""

    def __init__(self) -> None:
        self.decisions: dict[str, Decision] = {}
        self.contradictions: list[str] = []
        self.notes: list[str] = []

    def decide(self, name: str, recipe: Any, *stated: Decision) -> Any:
        """Take the value of the recipe unless it is None or `auto`, else the first that is stated.

        Args:
            name: Of the value.
            recipe: What the recipe says.
            *stated: What the files say, the first to be believed first; the last one is what holds
                where no file says anything, and no recipe contradicts that.

        Returns:
            The value.
        """
        told = [each for each in stated if each.value is not None]
        if recipe is None or recipe == "auto":
            self.decisions[name] = told[0]
            return told[0].value
        for each in stated[:-1]:
            if each.value is not None and each.value != recipe:
                self.contradictions.append(
                    f"{name} = {shown(recipe)} in the recipe, {shown(each.value)} in {each.source}"
                )
                break
        self.decisions[name] = Decision(recipe, RECIPE)
        return recipe


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file; of one that did not change it is computed once."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, _size: int, _modified: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
